"""A mixture of experts, one token and one choice after the other: what the layer is compared with."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

ACTIVATIONS = {"squared_relu": lambda x: x.clamp_min(0) ** 2, "silu": lambda x: x * torch.sigmoid(x),
               "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))}


class Found(NamedTuple):
    output: Tensor
    balance: Tensor
    z: Tensor
    counts: list[int]
    dropped: int


def naive(weights: dict[str, Tensor], x: Tensor, top_k: int = 2, *, capacity: float | None = None,
          activation: str = "squared_relu", score: str = "softmax", normalise: bool | None = None, scale: float = 1.0,
          bias: Tensor | None = None, counts: list[int] | None = None) -> Found:
    """`weights` by the layer's names, whole. `counts`: of more tokens than these, for the load-balancing loss."""
    router, up, down, gate = (weights.get(name) for name in ("router.weight", "experts.up", "experts.down",
                                                             "experts.gate"))
    act, experts, tokens = ACTIVATIONS[activation], len(router), x.reshape(-1, x.shape[-1])
    room = math.inf if capacity is None else max(1, math.ceil(capacity * len(tokens) * top_k / experts))
    normalise = top_k > 1 if normalise is None else normalise
    logits = [torch.stack([(token * row).sum() for row in router]) for token in tokens]
    scores = [one.softmax(0) if score == "softmax" else one.sigmoid() for one in logits]
    preferred = [(one.detach() if bias is None else one.detach() + bias).tolist() for one in scores]
    ranking = [sorted(range(experts), key=lambda e: (-one[e], e))[:top_k] for one in preferred]
    own, filled, dropped = [0] * experts, [0] * experts, 0
    output = [torch.zeros_like(token) for token in tokens]
    for choice in range(top_k):
        for n, token in enumerate(tokens):
            expert = ranking[n][choice]
            own[expert] += 1
            if filled[expert] >= room:
                dropped += 1
                continue
            filled[expert] += 1
            weight = scores[n][expert]
            if normalise:
                weight = weight / sum(scores[n][e] for e in ranking[n])
            inner = up[expert] @ token
            inner = act(inner) if gate is None else act(gate[expert] @ token) * inner
            output[n] = output[n] + scale * weight * (down[expert] @ inner)
    shares = [one / one.sum() for one in scores]
    mean = [sum(one[e] for one in shares) / len(tokens) for e in range(experts)]
    counts = counts or own
    balance = experts * sum(counts[e] / sum(counts) * mean[e] for e in range(experts))
    z = sum(torch.log(one.exp().sum()) ** 2 for one in logits) / len(tokens)
    return Found(torch.stack(output).view(x.shape), balance, z, own, dropped)


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def values(layer: nn.Module) -> dict[str, Tensor]:
    """Copies of its parameters, whole, as leaves."""
    return {name: whole(p.detach()).clone().requires_grad_() for name, p in layer.named_parameters()}


def grads(layer: nn.Module) -> dict[str, Any]:
    return {name: None if p.grad is None else whole(p.grad).clone() for name, p in layer.named_parameters()}
