"""Shards: the local part of a DTensor, where it lies in the whole, and sums over all parts.

`torch.distributed.tensor` takes long to import, so it is imported only where there is a DTensor already.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels import norm


def is_dtensor(tensor: Any) -> bool:
    """Whether this is a tensor of which other processes hold other parts, or the same."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def shares(tensor: Any) -> bool:
    """Whether other processes hold other parts of the tensor, or addends of it."""
    return is_dtensor(tensor) and not all(placement.is_replicate() for placement in tensor.placements)


def local(tensor: Tensor) -> Tensor:
    """The elements in this process's memory."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def alike(tensor: Any, pattern: Any) -> Any:
    """The tensor, placed as `pattern` is: addends are summed, shards exchanged; a collective where it must be."""
    if is_dtensor(pattern) and is_dtensor(tensor) and tensor.placements != pattern.placements:
        return tensor.redistribute(pattern.device_mesh, pattern.placements)
    return tensor


def statistics_of_shards(tensor: Any) -> tuple[Tensor, Tensor]:
    """The sum of squares of the whole tensor, float64, and whether any element of it is infinite or NaN.

    A collective: the same on every process that holds a part.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if any(placement.is_partial() for placement in tensor.placements):
        tensor = tensor.redistribute(placements=[Replicate() if placement.is_partial() else placement
                                                 for placement in tensor.placements])
    squares, found = norm.squares([tensor._local_tensor])
    placements = [Replicate() if placement.is_replicate() else Partial("sum") for placement in tensor.placements]
    both = torch.stack([squares[0], found.to(squares)])
    square, count = DTensor.from_local(both, tensor.device_mesh, placements, run_check=False).full_tensor()
    return square, count != 0


def as_whole(values: Tensor, pattern: Any) -> Tensor:
    """A local array, one element for each of the pattern's or one for each of its blocks, placed like the pattern."""
    if not is_dtensor(pattern):
        return values
    from torch.distributed.tensor import DTensor

    if values.shape == pattern._local_tensor.shape:
        shape, stride = pattern.shape, pattern.stride()
    else:
        shape, stride = torch.Size([len(values) * parts(pattern)]), (1,)
    return DTensor.from_local(values, pattern.device_mesh, pattern.placements, run_check=False, shape=shape,
                              stride=stride)


def parts(tensor: Any) -> int:
    """Into how many shards a tensor is cut."""
    if not is_dtensor(tensor):
        return 1
    sizes = [tensor.device_mesh.size(dim) for dim, placement in enumerate(tensor.placements) if placement.is_shard()]
    return math.prod(sizes)


def cuts_blocks(tensor: Any, block: int) -> bool:
    """Whether a shard may begin or end inside a block of so many elements, counted from the first of the whole."""
    if parts(tensor) == 1:
        return False
    rows = all(placement.is_replicate() or placement.is_shard(0) for placement in tensor.placements)
    return not rows or tensor.shape[0] % parts(tensor) != 0 or tensor.numel() // parts(tensor) % block != 0


def place(name: str, tensor: Any) -> tuple[int, int, int]:
    """Where the local elements lie in the row-major whole (`fasttrain.precision.draws.full_index`).

    Raises:
        ValueError: they do not lie in runs of one length at one distance.
    """
    if not shares(tensor):
        return 0, 0, 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, starts = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    whole = list(tensor.shape)
    strides = [math.prod(whole[dim + 1:]) for dim in range(len(whole))]
    first = sum(start * stride for start, stride in zip(starts, strides, strict=True))
    cut = [dim for dim in range(len(whole)) if sizes[dim] != whole[dim]]
    if not cut or all(sizes[dim] == 1 for dim in range(cut[-1])):
        return first, 0, 0
    inner = cut[-1]
    if any(sizes[dim] != whole[dim] for dim in range(1, inner)):
        raise ValueError(f"{name} is cut in dimensions {cut}: stochastic rounding needs shards whose elements lie at "
                         "one distance in the whole; use another master, state_rounding='nearest', or other "
                         "placements")
    return first, sizes[inner] * strides[inner], whole[inner] * strides[inner]
