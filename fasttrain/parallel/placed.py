"""Gradients of DTensors: the local part lies in a bucket, and the parameter shows a DTensor around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from fasttrain.optim.local import is_dtensor, local, settle


def parts(params: Sequence[Tensor]) -> list[Tensor]:
    """What this rank holds of each parameter."""
    return [local(p.detach()) for p in params]


def shown(params: Sequence[Any], views: list[Tensor]) -> list[Tensor]:
    """What parameters have as gradients: the views themselves, of DTensors one that is placed as its parameter."""
    if not any(is_dtensor(p) for p in params):
        return views
    return [wrapped(p, view, p.placements) if is_dtensor(p) else view for p, view in zip(params, views, strict=True)]


def addends(params: Sequence[Any], views: Sequence[Tensor]) -> list[Tensor]:
    """The same for gradients that are addends over the tensor axis: placed so, that more of them add up without a word
    to other ranks."""
    return [wrapped(p, view, [Partial() if name == "tensor" else placement for name, placement in
                              zip(p.device_mesh.mesh_dim_names, p.placements, strict=True)])
            if is_dtensor(p) else view for p, view in zip(params, views, strict=True)]


def wrapped(p: Any, view: Tensor, placements: Sequence[Any]) -> Tensor:
    """A DTensor around a local part."""
    return DTensor.from_local(view, p.device_mesh, placements, run_check=False, shape=p.shape, stride=p.stride())


def is_sum(placement: Any) -> bool:
    """Whether ranks hold addends."""
    return placement.is_partial() and getattr(placement, "reduce_op", "sum") == "sum"


def arrived(p: Any) -> Tensor:
    """The local part of a gradient, which is made to be placed as its parameter: where it is not, by a collective."""
    settle(p)
    return local(p.grad)


def arrived_addend(p: Any) -> tuple[Tensor, float]:
    """This rank's addend of a gradient over the tensor axis, and what to multiply it with.

    One that has come whole to each of n ranks is n times too much.
    """
    grad = p.grad
    if not is_dtensor(grad) or "tensor" not in p.device_mesh.mesh_dim_names:
        return arrived(p), 1.0
    at = p.device_mesh.mesh_dim_names.index("tensor")
    if grad.device_mesh == p.device_mesh and is_sum(grad.placements[at]) and all(
            mine == wanted for dim, (mine, wanted) in enumerate(zip(grad.placements, p.placements, strict=True))
            if dim != at):
        return local(grad), 1.0
    return arrived(p), 1.0 / p.device_mesh.size(at)
