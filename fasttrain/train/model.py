"""A GPT over bytes, or over the tokens of another vocabulary, to be read in one sitting.

Shapes: B sequences, T positions, C features, H heads, D = C / H features of a head, V tokens (of bytes 256).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.losses import cross_entropy

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
    """Attention, then two linear layers; each reads a normalised copy of the stream and adds to it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_feed = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        qkv = self.qkv(self.norm_attention(x_BTC))
        q, k, v = qkv.view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x_BTC = x_BTC + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x_BTC + self.down(F.relu(self.up(self.norm_feed(x_BTC))).square())


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
        return x_BTC


class GPT(nn.Module):
    """Predicts each byte, or token, from those before it.

    Args:
        layers, width, heads, ngrams, rows: as in `fasttrain.train.config.TrainConfig`.
        positions: the longest sequence.
        vocabulary: how many tokens there are.

    Example:
        >>> model = GPT(layers=1, width=16, heads=2, positions=8)
        >>> model(torch.zeros(3, 8, dtype=torch.long)).shape
        torch.Size([3, 8, 256])
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, layers: int, width: int, heads: int, positions: int, ngrams: int = 1, rows: int = 0,
                 vocabulary: int = VOCABULARY):
        super().__init__()
        self.embedding = Embedding(width, ngrams, rows, vocabulary)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        cos, sin = rotary(positions, width // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Rows of unit scale; what is added to the stream starts at zero, so every block begins as the identity."""
        for name, p in self.named_parameters():
            if name.endswith(("out.weight", "down.weight", "head.weight")):
                nn.init.zeros_(p)
            elif ".endings." in name:
                nn.init.normal_(p, std=0.02)  # most endings are rare: let a row speak once it has learnt something
            elif "embedding" in name:
                nn.init.normal_(p)
            elif p.ndim == 2:
                nn.init.normal_(p, std=1 / math.sqrt(p.shape[1]))

    def forward(self, bytes_BT: Tensor) -> Tensor:
        """Logits of the next byte, shape (B, T, V), from integers of shape (B, T)."""
        x = self.embedding(bytes_BT)
        T = bytes_BT.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        return self.head(self.norm(x))


def loss_of(model: nn.Module, windows_BT1: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Mean cross-entropy in nats per byte (or token), over windows of shape (B, T + 1).

    Inputs and targets overlap by T - 1. With label smoothing or a z-loss, which are in the mean then, it is
    `fasttrain.losses.cross_entropy`, whose derivative is written over the logits; without, torch's.
    """
    logits = model(windows_BT1[:, :-1])
    if label_smoothing or z_loss:
        return cross_entropy(logits, windows_BT1[:, 1:], label_smoothing=label_smoothing, z_loss=z_loss,
                             inplace_backward=torch.is_grad_enabled())
    return F.cross_entropy(logits.flatten(0, 1).float(), windows_BT1[:, 1:].flatten())
