"""Which experts a token goes to, and how much each of them counts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.parallel.building.rules import Normal, Rule, Zeros


class Routing(NamedTuple):
    """What a router says of N tokens and E experts; numbers are float32 (float64 for float64 tokens).

    Attributes:
        chosen: (N, top_k) int64, the experts of each token, the best first.
        weights: (N, top_k) what their outputs are multiplied with.
        shares: (N, E) scores that add up to 1 for each token.
        logits: (N, E).
        counts: (E,) int64, how many choices each expert got, before any is dropped.
    """

    chosen: Tensor
    weights: Tensor
    shares: Tensor
    logits: Tensor
    counts: Tensor


class Router(nn.Module):
    """Scores each expert for each token by a linear layer, and takes the `top_k` best.

    All arithmetic is in float32, also under autocast: in bfloat16 many scores would tie, and rounding would choose. Of
    equal scores the expert with the lower number goes first, on every device.

    Arguments:
        width: features of a token.
        experts, top_k: how many there are, and how many a token goes to.
        score: "softmax" of the logits over experts, or "sigmoid" of each.
        normalise: divide the weights of a token by their sum. It is the default where top_k > 1; with one expert the
            weight would always be 1, and the router would learn nothing from the loss.
        scale: a factor on all weights.
        bias: keep a number for each expert, which counts when experts are chosen and not in their weights: see
            `fasttrain.parallel.experts.rebalance`.

    Attributes:
        weight: (experts, width).
        bias: (experts,) float32, a buffer; None without it.
        load: (experts,) int64, this rank's choices since the bias was last moved; None before the first. No buffer: it
            is neither saved nor made equal between ranks.

    Raises:
        ValueError: there are fewer experts than a token goes to, or an unknown score.

    Example:
        >>> routing = Router(16, experts=4, top_k=2)(torch.randn(5, 16))
        >>> routing.chosen.shape, routing.weights.sum(1).allclose(torch.ones(5)), int(routing.counts.sum())
        (torch.Size([5, 2]), True, 10)

    Reference: Shazeer et al., arXiv 1701.06538, section 2.1; float32, Fedus et al., Switch Transformers, arXiv
    2101.03961, section 2.4; sigmoid and bias, DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
    """

    bias: Tensor | None

    def __init__(self, width: int, experts: int, top_k: int = 2, *, score: str = "softmax",
                 normalise: bool | None = None, scale: float = 1.0, bias: bool = False,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k={top_k} of {experts} experts: a token goes to one or more, and to none twice: "
                             f"give top_k from 1 to {experts}")
        if score not in ("softmax", "sigmoid"):
            raise ValueError(f"score={score!r}: give 'softmax' or 'sigmoid'")
        self.top_k, self.score, self.scale = top_k, score, scale
        self.normalise = top_k > 1 if normalise is None else normalise
        self.weight = nn.Parameter(torch.empty(experts, width, device=device, dtype=dtype))
        self.register_buffer("bias", torch.zeros(experts, device=device) if bias else None)
        self.load: Tensor | None = None
        self.reset_parameters()

    @property
    def experts(self) -> int:
        return self.weight.shape[0]

    def reset_parameters(self) -> None:
        """Draw the weight, of standard deviation ``1 / sqrt(width)``."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.weight.shape[1]))
        if self.bias is not None:
            self.bias.zero_()
        self.load = None

    def initial(self) -> dict[str, Rule]:
        """The same distributions, for `fasttrain.parallel.building.materialize`."""
        return {"weight": Normal(1 / math.sqrt(self.weight.shape[1])), "bias": Zeros()}

    def count(self, counts: Tensor) -> None:
        """Add to the load."""
        if self.bias is not None:
            self.load = counts.clone() if self.load is None else self.load + counts

    def forward(self, tokens: Tensor) -> Routing:
        """For tokens of shape (N, width)."""
        exact = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            logits = F.linear(tokens.to(exact), self.weight.to(exact))
            if self.score == "softmax":
                scores = shares = logits.softmax(1)
            else:
                scores = logits.sigmoid()
                shares = scores / total(scores)
            ranked = scores.detach() if self.bias is None else scores.detach() + self.bias
            # By a stable sort: what topk does with ties is open.
            chosen = ranked.sort(dim=1, descending=True, stable=True).indices[:, : self.top_k]
            weights = scores.gather(1, chosen)
            if self.normalise:
                weights = weights / total(weights)
            return Routing(chosen, weights * self.scale, shares, logits, counted(chosen, self.experts))

    def extra_repr(self) -> str:
        return (f"{self.weight.shape[1]}, experts={self.experts}, top_k={self.top_k}, score={self.score!r}, "
                f"normalise={self.normalise}, scale={self.scale}, bias={self.bias is not None}")


def total(scores: Tensor) -> Tensor:
    """The sum of a token's scores, never zero."""
    return scores.sum(1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def counted(chosen: Tensor, experts: int) -> Tensor:
    """How many choices each expert got. Nothing waits for the device, as `bincount` would."""
    flat = chosen.flatten()
    return torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
