"""Shards: the local part of a DTensor, which elements of the whole it holds, and sums over all parts.

`torch.distributed.tensor` takes long to import, so it is imported only where there is a DTensor already. A placement is
known by its attributes: `_StridedShard`, which `fully_shard` over tensor parallelism gives, is no `Shard`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels import norm


def dtensor_type() -> Any:
    """DTensor, or None where nobody has imported it, so that there is none."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_dtensor(tensor: Any) -> bool:
    """Whether this is a tensor of which other processes hold other parts, or the same."""
    known = dtensor_type()
    return known is not None and isinstance(tensor, known)


def shares(tensor: Any) -> bool:
    """Whether other processes hold other parts of the tensor, or addends of it."""
    return is_dtensor(tensor) and not all(placement.is_replicate() for placement in tensor.placements)


def local(tensor: Any) -> Any:
    """The elements in this process's memory; what is no DTensor is returned as it is."""
    if not is_dtensor(tensor):
        return tensor
    part = tensor._local_tensor
    return part.wait() if hasattr(part, "wait") else part  # the result of a collective that is under way


def version(tensor: Any) -> int:
    """What changes whenever a tensor is written through torch, through the whole or through its local part."""
    return tensor._version + (tensor._local_tensor._version if is_dtensor(tensor) else 0)


def check_placed(name: str, p: Any) -> None:
    """Raise if a parameter, or its gradient, is cut in a way that cannot be stepped."""
    if is_dtensor(p) and any(placement.is_partial() for placement in p.placements):
        raise ValueError(f"{name} is placed {p.placements}: each process holds an addend of it, and a step cannot "
                         "change a sum; redistribute it to Replicate or Shard")
    if is_dtensor(p.grad) and not is_dtensor(p):
        raise TypeError(f"{name} is no DTensor, and its gradient is one, placed {p.grad.placements}: distribute the "
                        "parameter (distribute_tensor), or give it grad.full_tensor()")


def settle(p: Any) -> None:
    """Have the gradient placed as its parameter is: addends are summed, shards exchanged.

    A collective where it has to be done, which puts the new gradient into the place of the old one: the norm and the
    step need it both.
    """
    grad = p.grad
    if not is_dtensor(p) or not is_dtensor(grad) or (
            grad.placements == p.placements and grad.device_mesh == p.device_mesh):
        return
    with torch.no_grad():
        p.grad = grad.redistribute(p.device_mesh, p.placements)


def over_parts(values: Tensor, like: Any, what: str = "sum") -> Tensor:
    """The "sum", "max" or "min" of local numbers over the processes that hold different parts.

    A collective, which gives the same bits to each.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Replicate() if placement.is_replicate() else Partial(what) for placement in like.placements]
    return DTensor.from_local(values, like.device_mesh, placements, run_check=False).full_tensor()


def cut_alike(params: Sequence[Any]) -> list[list[int]]:
    """The places of parameters that are cut over the same processes, and lie on one device, together."""
    groups: dict[Any, list[int]] = {}
    for index, p in enumerate(params):
        cut = tuple(not placement.is_replicate() for placement in p.placements)
        groups.setdefault((p.device_mesh, cut, p.device), []).append(index)
    return list(groups.values())


def totals_of_parts(params: Sequence[Any], own: Sequence[Tensor]) -> list[Tensor]:
    """For each parameter the sums of its numbers over the processes that hold different parts of it.

    One collective for all that are cut over the same processes (one for each dimension of the mesh that cuts), to which
    every process comes with the same parameters in the same order.

    Arguments:
        own: this process's numbers, float64, of one dimension, of the same length on every process.
    """
    totals = list(own)
    for members in cut_alike(params):
        together = torch.cat([own[index] for index in members])
        together = over_parts(together, params[members[0]])
        for index, part in zip(members, together.split([len(own[index]) for index in members]), strict=True):
            totals[index] = part
    return totals


def check_given(named: Sequence[tuple[str, Any]], given: Sequence[float], why: str) -> None:
    """Raise, on every process alike, if only some of those that hold parts of a parameter have its gradient.

    Arguments:
        named: how errors call each parameter, and the parameter.
        given: on how many processes it has a gradient.
        why: what cannot be done then.
    """
    for (name, p), count in zip(named, given, strict=True):
        if 0 < count < parts(p):
            raise RuntimeError(f"{name} has a gradient on {int(count)} of the {parts(p)} processes that hold its "
                               f"parts, and {why}: give zeros on the others, or none on all")


def statistics_of_parts(params: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Of the gradients of parameters that share: the sum of squares of each, float64, and whether any element of any is
    infinite or NaN.

    One collective for all that are cut over the same processes, in which a process without gradients takes part too.
    The gradients are settled.
    """
    sums: list[Any] = [None] * len(params)
    found = []
    for members in cut_alike(params):
        device = params[members[0]].device
        both = torch.zeros(len(members) + 1, dtype=torch.float64, device=device)
        given = [place for place, index in enumerate(members) if params[index].grad is not None]
        if given:
            squares, bad = norm.squares([local(params[members[place]].grad) for place in given])
            both[torch.tensor(given, device=device)] = squares
            both[-1] = bad.to(both)
        both = over_parts(both, params[members[0]])
        found.append(both[-1] != 0)
        for index, square in zip(members, both[:-1], strict=True):
            sums[index] = square
    home = params[0].device
    return torch.stack([square.to(home) for square in sums]), torch.stack([bad.to(home) for bad in found]).any()


def norm_of_parts(p: Any, norm_type: float) -> Tensor:
    """A norm of the whole gradient of a parameter: float64, of shape (); a collective."""
    grad = local(p.grad).double().flatten()
    if math.isinf(norm_type):
        nothing = grad.new_tensor(0.0 if norm_type > 0 else math.inf)
        own = torch.linalg.vector_norm(grad, norm_type) if grad.numel() else nothing
        return over_parts(own, p, "max" if norm_type > 0 else "min")
    if norm_type == 0:
        return over_parts(grad.count_nonzero().double(), p)
    return over_parts(grad.abs().pow(norm_type).sum(), p).pow(1 / norm_type)


def as_whole(values: Tensor, pattern: Any) -> Tensor:
    """A local array, one element for each of the pattern's or one for each of its blocks, placed like the pattern."""
    if not is_dtensor(pattern):
        return values
    if values.shape == local(pattern).shape:
        shape, stride = pattern.shape, pattern.stride()
    else:
        shape, stride = torch.Size([len(values) * parts(pattern)]), (1,)
    return dtensor_type().from_local(values, pattern.device_mesh, pattern.placements, run_check=False, shape=shape,
                                     stride=stride)


def copied(values: Tensor, like: Any) -> Tensor:
    """A tensor that every process has, as a DTensor of copies on the mesh of another."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(values, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


def window(tensor: Any) -> tuple[Any, ...]:
    """What indexes the elements that this process holds in the whole: slices where they follow one another."""
    held = positions(tensor)
    if all(run_length(index) == len(index) for index in held):
        return tuple(slice(int(index[0]), int(index[-1]) + 1) if len(index) else slice(0) for index in held)
    return tuple(index.view(-1, *[1] * (len(held) - 1 - dim)).to(tensor.device) for dim, index in enumerate(held))


def gathered(values: Tensor, pattern: Any) -> Tensor:
    """The whole of which each process has its part, placed as the pattern is; a collective."""
    return as_whole(values, pattern).full_tensor()  # type: ignore[attr-defined]


def whole_of(tensor: Any) -> Tensor:
    """The whole of a DTensor, in any dtype; a collective.

    Neither gloo nor NCCL carries all of 8 and 16 bits (no int16, gloo no float8): the bytes go as uint8 and float16.
    """
    carrier = {1: torch.uint8, 2: torch.float16}.get(tensor.dtype.itemsize, tensor.dtype)
    if any(placement.is_partial() for placement in tensor.placements):
        return tensor.full_tensor()
    return gathered(local(tensor.detach()).view(carrier), tensor).view(tensor.dtype)


def part_of(whole: Tensor, pattern: Any) -> Tensor:
    """What this process holds of a tensor that every process has, if it is placed as the pattern is."""
    if not shares(pattern):
        return whole
    for dim, held in enumerate(positions(pattern)):
        if len(held) != whole.shape[dim]:
            whole = whole.index_select(dim, held.to(whole.device))
    return whole.contiguous()


def cuts(tensor: Any) -> list[tuple[int, Any]]:
    """Mesh dimension and placement of every cut of a tensor, in the order in which they are made."""
    if not is_dtensor(tensor):
        return []
    return [(dim, placement) for dim, placement in enumerate(tensor.placements)
            if not placement.is_replicate() and not placement.is_partial()]


def parts(tensor: Any) -> int:
    """Into how many shards a tensor is cut."""
    return math.prod(tensor.device_mesh.size(dim) for dim, _ in cuts(tensor))


def chunk(index: Tensor, count: int, number: int) -> Tensor:
    """One of `count` chunks as `torch.chunk` makes them, with empty ones at the end."""
    size = -(-len(index) // count)
    return index[number * size:(number + 1) * size]


def positions(tensor: Any) -> list[Tensor]:
    """For each dimension, the indices in the whole that this process holds of it."""
    index = [torch.arange(size) for size in tensor.shape]
    for mesh_dim, placement, pieces in in_turn(tensor):
        count, number = tensor.device_mesh.size(mesh_dim), tensor.device_mesh.get_local_rank(mesh_dim)
        index[placement.dim] = torch.cat([chunk(chunk(index[placement.dim], pieces, piece), count, number)
                                          for piece in range(pieces)])
    return index


def in_turn(tensor: Any) -> list[tuple[int, Any, int]]:
    """Mesh dimension, placement and pieces of every cut, in the order in which they are made; each cuts every piece.

    What `fully_shard` cuts (`_StridedShard`) was cut along later dimensions of the mesh before. Where the pieces are
    those parts, it is simply cut after them; torch's own order comes to the same if all are even.
    """
    turns: list[tuple[int, Any, int]] = []
    made = cuts(tensor)
    for place, (mesh_dim, placement) in reversed(list(enumerate(made))):
        pieces = getattr(placement, "split_factor", 1)
        later = math.prod(tensor.device_mesh.size(dim) for dim, one in made[place + 1:] if one.dim == placement.dim)
        if pieces > 1 and pieces == later:
            turns.append((mesh_dim, placement, 1))
        else:
            turns.insert(0, (mesh_dim, placement, pieces))
    return turns


def run_length(index: Tensor) -> int:
    """How many indices follow one another at the start."""
    breaks = (index.diff() != 1).nonzero()
    return int(breaks[0]) + 1 if len(breaks) else len(index)
