"""Models divided over the tensor axis, beside the same model on one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.dist.mesh import Mesh
from fasttrain.losses import cross_entropy
from fasttrain.optim import AdamW
from fasttrain.optim.local import is_dtensor
from fasttrain.parallel.tensor import tensor_parallel

STEPS, LIMIT = 3, 0.5  # the norm is above the limit in every step: clipping counts


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def entropy(model: nn.Module, tokens: Tensor) -> Tensor:
    """The mean cross-entropy of the next token."""
    torch.manual_seed(3)  # of what is dropped
    logits = model(tokens[:, :-1])
    logits = getattr(logits, "logits", logits)
    return cross_entropy(logits, tokens[:, 1:])


def lively(model: nn.Module) -> nn.Module:
    """Every parameter drawn, so that none is zero or one, where a mistake would not show."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * (0.5 if p.ndim == 1 else 0.2)
                    + (p.ndim == 1))
    return model


def compare(model: nn.Module, mesh: Mesh, batches: list[Any], loss_of: Callable[[nn.Module, Any], Tensor],
            bound: float, **options: Any) -> dict[str, float]:
    """Train a model divided and whole, on every rank; the largest differences of anything, relative to its size.

    Raises:
        AssertionError: one is above the bound.
    """
    alone = copy.deepcopy(model)
    tensor_parallel(model, mesh, **options)
    pairs = dict(alone.named_parameters())
    assert [name for name, _ in model.named_parameters()] == list(pairs)
    ours = AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1)
    theirs = AdamW(alone.named_parameters(), lr=1e-2, weight_decay=0.1)
    worst: dict[str, float] = {}

    def check(what: str, one: Tensor, other: Tensor, scale: float | None = None) -> None:
        size = scale if scale is not None else other.abs().max().item()
        error = (one - other).abs().max().item() / max(size, 1e-300)
        kind = what.split()[0]
        worst[kind] = max(worst.get(kind, 0.0), error)
        assert one.shape == other.shape, what
        assert error <= bound, f"{what}: {error:.1e} of its size apart, and the bound is {bound:.0e}"

    for step, batch in enumerate(batches):
        mine, other = loss_of(model, batch), loss_of(alone, batch)
        check(f"loss of step {step}", whole(mine.detach()), other.detach())
        mine.backward()
        other.backward()
        for name, p in model.named_parameters():
            check(f"gradient {name} of step {step}", whole(p.grad), pairs[name].grad)
        norm, wanted = ours.clip_grad_norm_(LIMIT), theirs.clip_grad_norm_(LIMIT)
        assert wanted > LIMIT, wanted
        check(f"norm of step {step}", norm, wanted)
        ours.step()
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
        for name, p in model.named_parameters():
            check(f"parameter {name} after step {step}", whole(p.detach()), pairs[name].detach())
    return worst
