"""Rows on their way to experts and back, with derivatives: to slots, to other ranks, and added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fasttrain.dist.wire import Wire
from fasttrain.kernels import rows as kernel
from fasttrain.parallel.experts.plan import Plan


def spread(rows: Tensor, plan: Plan) -> Tensor:
    """The token of each slot: (slots, C) from (tokens, C)."""
    return _Spread.apply(rows, plan.origins, plan.places)


def gathered(slots: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
    """For each token the sum of its slots, weighted if there are weights (tokens, top_k)."""
    return _Gathered.apply(slots, plan.origins, plan.places, weights)


def exchanged(rows: Tensor, wire: Wire, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
    """``sends[r]`` rows to each rank r, in their order, and ``receives[r]`` rows from each, one after the other.

    Backward sends the derivatives the way back. Every rank takes part, whether it has rows or not.
    """
    return _Exchanged.apply(rows, wire, list(sends), list(receives))


def entering(tensor: Tensor, wire: Wire | None) -> Tensor:
    """The same on every rank of the wire, each of which adds its own to the derivative: backward is their sum.

    Reference: f of Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3.
    """
    return tensor if wire is None else _Entering.apply(tensor, wire)


def leaving(tensor: Tensor, wire: Wire | None) -> Tensor:
    """The sum over the ranks of the wire, of which each then has the derivative: g of the same section."""
    return tensor if wire is None else _Leaving.apply(tensor, wire)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, origins: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return kernel.take(rows.contiguous(), origins, places.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return kernel.combine(grad.contiguous(), places), None, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slots: Tensor, origins: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
        slots = slots.contiguous()
        ctx.save_for_backward(slots if weights is not None else None, origins, weights)
        ctx.choices = places.shape[1]
        return kernel.combine(slots, places, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slots, origins, weights = ctx.saved_tensors
        if weights is None:
            return kernel.take(grad.contiguous(), origins, ctx.choices), None, None, None
        by_slots, by_weights = kernel.differentiate(grad.contiguous(), slots, origins, weights)
        return by_slots, None, None, by_weights.to(weights.dtype)


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, wire: Wire, sends: list[int], receives: list[int]) -> Tensor:
        ctx.wire, ctx.sends, ctx.receives = wire, sends, receives
        return _all_to_all(rows, wire, sends, receives)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(grad, ctx.wire, ctx.receives, ctx.sends), None, None, None


def _all_to_all(rows: Tensor, wire: Wire, sends: list[int], receives: list[int]) -> Tensor:
    into = rows.new_empty(sum(receives), *rows.shape[1:])
    wire.all_to_all(into.split(receives), rows.contiguous().split(sends)).wait()
    return into


class _Entering(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _sum(grad, ctx.wire), None


class _Leaving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, wire: Wire) -> Tensor:
        return _sum(tensor, wire)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


def _sum(tensor: Tensor, wire: Wire) -> Tensor:
    return wire.sum_(tensor.clone(memory_format=torch.contiguous_format))
