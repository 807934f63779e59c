"""Where the elements of a shard lie in the row-major whole, and whether it cuts blocks of elements."""

from __future__ import annotations

import math
from typing import Any

import torch

from fasttrain.optim.local import cuts, local, parts, positions, run_length, shares
from fasttrain.optim.part import declared


def cuts_blocks(tensor: Any, block: int) -> bool:
    """Whether a shard may begin or end inside a block of so many elements, counted from the first of the whole.

    The answer is the same on every process.
    """
    if (part := declared(tensor)) is not None:
        return not part.blocks
    made = cuts(tensor)
    if parts(tensor) == 1:
        return False
    finest = [tensor.device_mesh.size(dim) * getattr(placement, "split_factor", 1) for dim, placement in made]
    if any(placement.dim for _, placement in made) or any(tensor.shape[0] % n for n in (parts(tensor), *finest)):
        return True
    row = tensor.numel() // max(1, tensor.shape[0])
    return run_length(positions(tensor)[0]) * row % block != 0


def place(name: str, tensor: Any) -> tuple[int, int, int]:
    """Where the local elements lie in the row-major whole (`fasttrain.precision.draws.full_index`).

    Raises:
        ValueError: they do not lie in runs of one length at one distance.
    """
    if (part := declared(tensor)) is not None:
        return part.first, part.run, part.pitch
    if not shares(tensor) or local(tensor).numel() == 0:
        return 0, 0, 0
    whole, index = tensor.shape, positions(tensor)
    cut = [dim for dim, held in enumerate(index) if len(held) != whole[dim]]
    if not cut:
        return 0, 0, 0
    inner, strides = cut[-1], [math.prod(whole[dim + 1:]) for dim in range(len(whole))]
    stride = strides[inner]
    outer = torch.zeros(1, dtype=torch.int64)  # where each of what lies outside of the innermost cut begins
    for dim in range(inner):
        outer = (outer[:, None] + index[dim] * strides[dim]).flatten()
    first, run = int(outer[0] + index[inner][0] * stride), run_length(index[inner])
    if len(outer) == 1 and run == len(index[inner]):
        return first, 0, 0
    starts = (outer[:, None] + index[inner][::run] * stride).flatten()
    apart = starts.diff()
    runs = index[inner].view(-1, run) if len(index[inner]) % run == 0 else None
    if runs is None or (runs.diff() != 1).any() or (apart != apart[0]).any():
        raise ValueError(f"{name} is placed {tensor.placements}: stochastic rounding needs shards whose elements lie "
                         "in runs of one length and distance in the whole; use another master, "
                         "state_rounding='nearest', or other placements")
    return first, run * stride, int(apart[0])
