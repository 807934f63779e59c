"""Memory for states of an optimizer that are loaded: what this process holds of each, placed as its parameter is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fasttrain.checkpoint.parts import BY_NAME
from fasttrain.checkpoint.saved import Saved
from fasttrain.optim import Optimizer
from fasttrain.optim.local import as_whole, is_dtensor, local
from fasttrain.precision.codecs import array_shapes, codec
from fasttrain.precision.storage import is_plain


def home(one: Mapping[str, Any], p: Any, saved: Saved, optimizer: Any, device: torch.device | str) -> Any:
    """Empty memory for what this process holds of a state.

    Arguments:
        one: what refers to it (`reference`).
        optimizer: that has the parameter.
    """
    kind = saved.kinds[one["name"]]
    shape, dtype = torch.Size(kind.shape), BY_NAME[kind.dtype]
    with torch.no_grad():
        if not is_dtensor(p) or not shape:
            like = one.get("like") and shape == p.shape and not is_dtensor(p)
            return torch.empty_like(p, dtype=dtype, device=device, requires_grad=False) if like else \
                torch.empty(shape, dtype=dtype, device=device)
        held = local(p)
        if shape == p.shape:
            return as_whole(torch.empty_like(held, dtype=dtype, device=device, requires_grad=False), p)
        if (mine := _coded(p, shape, optimizer, held)) is not None:
            return as_whole(torch.empty(mine, dtype=dtype, device=device), p)
        return placed_like(shape, dtype, p, device)


def _coded(p: Any, shape: torch.Size, optimizer: Any, held: Tensor) -> tuple[int, ...] | None:
    """Of an array with something for each block of a parameter, the shape here; None if it is none."""
    if len(shape) != 1 or not isinstance(optimizer, Optimizer):
        return None
    group = next(group for group in optimizer.param_groups if any(p is other for other in group["params"]))
    if is_plain(group) or not optimizer.takes_storage(group):
        return None
    layout = optimizer._layout("a parameter", p, p.dtype, group, optimizer.rule_of(group))
    for number in layout.codecs:
        if codec(number).block:
            for whole, mine in zip(array_shapes(number, p.shape), array_shapes(number, held.shape), strict=True):
                if whole == tuple(shape) and mine is not None:
                    return mine
    return None


def reference(name: str, value: Any, p: Any) -> dict[str, Any]:
    """What refers to a tensor of a state of a parameter."""
    told: dict[str, Any] = {"name": name}
    if value.shape == p.shape and local(value).stride() == local(p).stride() and value.dim():
        told["like"] = True
    if p.device.type != "cpu" and value.device.type == "cpu":
        told["host"] = True
    return told


def placed_like(shape: torch.Size, dtype: torch.dtype, p: Any, device: torch.device | str) -> Any:
    """A tensor of another shape than its sharded parameter: cut in the dimensions that both have, else the same on all.

    Statistics of rows and columns are of this kind.
    """
    if len(shape) != p.dim() or any(size not in (1, whole) for size, whole in zip(shape, p.shape, strict=True)):
        return torch.empty(shape, dtype=dtype, device=device)
    from torch.distributed.tensor import DTensor, Replicate

    whole = [placement.is_replicate() or shape[placement.dim] != p.shape[placement.dim] for placement in p.placements]
    placements = [Replicate() if same else placement for same, placement in zip(whole, p.placements, strict=True)]
    mine = tuple(here if size == whole else 1
                 for size, whole, here in zip(shape, p.shape, local(p).shape, strict=True))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(torch.empty(mine, dtype=dtype, device=device), p.device_mesh, placements, run_check=False,
                              shape=shape, stride=stride)
