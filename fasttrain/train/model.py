"""A GPT over bytes, or over the tokens of another vocabulary, to be read in one sitting.

Shapes: B sequences, T positions, C features, H heads, D = C / H features of a head, V tokens (of bytes 256).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.parallel.building import Normal, Rule, Zeros, materialize

if TYPE_CHECKING:
    from fasttrain.dist.mesh import Mesh
    from fasttrain.parallel.context import ContextParallel

VOCABULARY = 256  # of bytes


def rotary(positions: int, features: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles ``t / 10000^(2j/D)``, each of shape (positions, features / 2).

    Reference: Su et al., RoFormer, arXiv 2104.09864, section 3.
    """
    frequencies = 10000.0 ** (-torch.arange(0, features, 2) / features)
    angles = torch.outer(torch.arange(positions), frequencies)
    return angles.cos(), angles.sin()


def rotate(x_BHTD: Tensor, cos_TD2: Tensor, sin_TD2: Tensor) -> Tensor:
    """Turn each pair of features (j, j + D/2) at position t by its angle: products of q and k see only distances."""
    a, b = x_BHTD.chunk(2, dim=-1)
    return torch.cat((a * cos_TD2 - b * sin_TD2, a * sin_TD2 + b * cos_TD2), dim=-1)


class Block(nn.Module):
    """Attention, then a feed-forward part; each reads a normalised copy of the stream and adds to it.

    Args:
        width: features.
        heads: of queries.
        kv_heads: of keys and values, each of which serves ``heads / kv_heads`` of queries.
        gated: multiply what goes up by a gate, in place of squaring it.
        mixture: makes what takes the place of the feed-forward part.

    The rows of `qkv` lie in the order of key heads: queries of the first, its key, its value, then those of the next.
    So ranks that divide the rows (`fasttrain.parallel.tensor_parallel`) have whole heads, and the same code.

    Reference: grouped queries, Ainslie et al., arXiv 2305.13245; gates, Shazeer, arXiv 2002.05202.
    """

    context: ContextParallel | None = None  # by what positions are divided over ranks, if they are

    def __init__(self, width: int, heads: int, kv_heads: int | None = None, gated: bool = False,
                 mixture: Callable[[], nn.Module] | None = None):
        super().__init__()
        self.features, self.shared = width // heads, heads // (kv_heads or heads)
        hidden = feed_width(width, gated)
        self.norm_attention = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, (self.shared + 2) * (kv_heads or heads) * self.features, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_feed = nn.RMSNorm(width)
        self.mixture = mixture() if mixture is not None else None
        if mixture is not None:
            return
        self.gate = nn.Linear(width, hidden, bias=False) if gated else None
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attention(self.norm_attention(x_BTC), cos, sin)
        return x_BTC + self.feed(self.norm_feed(x_BTC))

    def attention(self, x_BTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = self.qkv(x_BTC)
        B, T, _ = qkv.shape  # all T of this rank, where the stream between blocks is divided
        q, k, v = qkv.view(B, T, -1, self.shared + 2, self.features).split([self.shared, 1, 1], dim=3)
        q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in (q, k, v))  # each (B, its heads, T, D)
        if self.context is None:
            q, k = (rotate(part, cos[:T], sin[:T]) for part in (q, k))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.shared > 1)
        else:
            cos, sin = (self.context.cut(table[: T * self.context.size], 0) for table in (cos, sin))
            y = self.context.attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))

    def feed(self, x_BTC: Tensor) -> Tensor:
        if self.mixture is not None:
            return self.mixture(x_BTC)
        up = self.up(x_BTC)
        return self.down(F.relu(up).square() if self.gate is None else F.silu(self.gate(x_BTC)) * up)


def feed_width(width: int, gated: bool) -> int:
    """Features within the feed-forward part: four times the width, or with a gate 8/3, rounded up to a multiple of 64.

    So there are as many parameters with a gate as without, or a few more.
    """
    return -(-8 * width // (3 * 64)) * 64 if gated else 4 * width


class Embedding(nn.Module):
    """A row for each byte, plus a row for what it ends: the last two bytes, the last three, and so on.

    One byte says little. Looking up whole endings gives the first block what it would else learn slowly to put
    together, at the cost of memory and not of arithmetic. Endings share rows: there are too many to have one each.

    Args:
        width: features.
        ngrams: the longest ending, in bytes; 1 for single bytes only.
        rows: of each table of endings. Which row an ending has is given by a multiplicative hash.
        vocabulary: how many tokens there are; where they are not bytes, read "token" for "byte" here.

    Reference: hash n-gram embeddings of Pagnoni et al., Byte Latent Transformer, arXiv 2412.09871, section 3.2.1.
    """

    context: ContextParallel | None = None  # endings reach over its cuts: positions are left out when all is looked up

    def __init__(self, width: int, ngrams: int, rows: int, vocabulary: int = VOCABULARY):
        super().__init__()
        self.rows = rows
        self.bytes = nn.Embedding(vocabulary, width)
        self.endings = nn.ModuleList(nn.Embedding(rows, width) for _ in range(ngrams - 1))

    def forward(self, bytes_BT: Tensor) -> Tensor:
        x_BTC, ending_BT = self.bytes(bytes_BT), bytes_BT
        for n, table in enumerate(self.endings, 1):
            earlier_BT = F.pad(bytes_BT, (n, 0))[:, : bytes_BT.shape[1]]  # the byte n places before
            ending_BT = ending_BT * (self.bytes.num_embeddings + 1) + earlier_BT
            x_BTC = x_BTC + table((ending_BT * 2654435761 >> 16) % self.rows)  # an overflow only mixes more
        return x_BTC if self.context is None else self.context.cut(x_BTC, 1)


class GPT(nn.Module):
    """Predicts each byte, or token, from those before it.

    Args:
        layers, width, heads, ngrams, rows: as in `fasttrain.train.config.TrainConfig`.
        positions: the longest sequence.
        vocabulary: how many tokens there are.
        kv_heads, gated: of the blocks; see `Block`.
        tied: the last layer has the weight of the single tokens' embedding.
        experts, top_k: of a `fasttrain.parallel.experts.MoE` in each block; 0: none.
        mesh: divides the experts.

    It is a chain of `parts`, of which a rank of a pipeline may `keep` some; `forward` runs those that there are.

    Example:
        >>> model = GPT(layers=1, width=16, heads=2, positions=8)
        >>> model(torch.zeros(3, 8, dtype=torch.long)).shape
        torch.Size([3, 8, 256])
        >>> model.parts()
        ['embedding', 'blocks.0', 'head']
    """

    cos: Tensor
    sin: Tensor
    embedding: Embedding | None
    norm: nn.RMSNorm | None
    head: nn.Linear | None

    def __init__(self, layers: int, width: int, heads: int, positions: int, ngrams: int = 1, rows: int = 0,
                 vocabulary: int = VOCABULARY, kv_heads: int | None = None, gated: bool = False, tied: bool = False,
                 experts: int = 0, top_k: int = 2, mesh: Mesh | None = None):
        super().__init__()
        if heads % (kv_heads or heads):
            raise ValueError(f"{heads} heads cannot share {kv_heads} heads of keys: give a divisor of {heads}")
        self.positions, self.experts, self.width, self.features = positions, experts, width, width // heads
        self._context: ContextParallel | None = None
        embedding, head = Embedding(width, ngrams, rows, vocabulary), nn.Linear(width, vocabulary, bias=False)
        if tied:
            head.weight = embedding.bytes.weight
        self.tied = {"head.weight": "embedding.bytes.weight"} if tied else {}
        self.embedding = embedding
        mixture = None
        if experts:
            from fasttrain.parallel.experts import MoE

            mixture = partial(MoE, width, feed_width(width, True), experts, top_k, gated=True, mesh=mesh)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, gated, mixture) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = head
        self.build_buffers()
        if not head.weight.is_meta:
            materialize(self, seed=int(torch.randint(1 << 62, ())), everything=True)

    def build_buffers(self) -> None:
        """Compute the tables of angles: all that is not in the state dict."""
        cos, sin = rotary(self.positions, self.features)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def initial(self) -> dict[str, Rule]:
        """How parameters begin, by patterns of their names: rows of unit scale; what is added to the stream at zero.

        So every block begins as the identity.
        """
        rows = Normal(1 / math.sqrt(self.width))
        return {
            "*.out.weight": Zeros(), "*down*": Zeros(), "head.weight": rows if self.tied else Zeros(),
            "*.endings.*": Normal(0.02),  # most endings are rare: let a row speak once it has learnt something
            "embedding.*": rows if self.tied else Normal(1.0),
            "*.qkv.weight": rows, "*.up*": rows, "*.gate*": rows, "*.router.weight": rows,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next byte, shape (B, T, V), from integers of shape (B, T), if all parts are here."""
        return self.run(self.parts(), x)

    @property
    def context(self) -> ContextParallel | None:
        """By what positions are divided over ranks; None: they are not."""
        return self._context

    @context.setter
    def context(self, context: ContextParallel | None) -> None:
        self._context = context
        for module in self.modules():
            if isinstance(module, (Block, Embedding)):
                module.context = context

    def parts(self) -> list[str]:
        """The parts that are here, in the order in which they run."""
        blocks = [f"blocks.{name}" for name, _ in self.blocks.named_children()]
        return ["embedding"] * (self.embedding is not None) + blocks + ["head"] * (self.head is not None)

    def keep(self, parts: Sequence[str]) -> None:
        """Drop all parts but these; what stays has the names that it had."""
        if unknown := set(parts) - set(self.parts()):
            raise ValueError(f"{sorted(unknown)} are no parts of this model, which has {', '.join(self.parts())}")
        for part in set(self.parts()) - set(parts):
            if part == "embedding":
                self.embedding = None
            elif part == "head":
                self.norm = self.head = None
            else:  # `del` of a ModuleList would give those behind other names
                self.blocks._modules.pop(part.removeprefix("blocks."))

    def run(self, parts: Sequence[str], x: Tensor) -> Tensor:
        """The output of some parts that follow one another, from that of the part before them."""
        for part in parts:
            if part == "embedding":
                assert self.embedding is not None
                x = self.embedding(x)
            elif part == "head":
                assert self.norm is not None
                assert self.head is not None
                x = self.head(self.norm(x))
            else:
                x = self.blocks._modules[part.removeprefix("blocks.")](x, self.cos, self.sin)
        return x
