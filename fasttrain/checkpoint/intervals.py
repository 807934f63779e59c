"""An interval of what a process holds of a tensor, as boxes of the whole: the pieces of ZeRO, of cut parameters too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.checkpoint.parts import Part, boxes
from fasttrain.checkpoint.regions import Region
from fasttrain.optim.local import is_dtensor, local, positions
from fasttrain.optim.placing import place


def in_memory_order(name: str, flat: Tensor, whole: Any, first: int, row_major: bool = False) -> list[Part]:
    """The parts that an interval is made of, whose elements are counted in the order of a tensor's memory.

    Arguments:
        flat: the interval's elements.
        whole: a tensor that fills one stretch of memory, in whatever order of its dimensions; or a DTensor whose local
            part does, and is what is counted.
        first: the interval's first element.
        row_major: they are counted in this order, however they lie.
    """
    index = positions(whole) if is_dtensor(whole) else None
    held = torch.empty(local(whole).shape, device="meta") if row_major else local(whole)
    return interval(name, flat, held, first, tuple(whole.shape), index)


def interval(name: str, flat: Tensor, held: Tensor, first: int, shape: tuple[int, ...],
             index: Sequence[Tensor] | None) -> list[Part]:
    """`in_memory_order` of a tensor that is held in part.

    Arguments:
        held: what this process holds; its shape and strides are looked at.
        shape: of the whole.
        index: for each dimension, the indices in the whole that are held, ascending in runs; None: all.
    """
    strides = held.stride()
    outer = sorted(range(held.dim()), key=lambda dim: (-strides[dim] if held.shape[dim] > 1 else 1, dim))
    inverse = [outer.index(dim) for dim in range(held.dim())]
    found = []
    for at, (lower, extent) in Region(tuple(held.shape[dim] for dim in outer), span=(first, flat.numel())).blocks():
        view = flat[at : at + math.prod(extent)].view(extent).permute(inverse)
        low, size = (tuple(side[place] for place in inverse) for side in (lower, extent))
        if index is None:
            found.append(Part(name, view, Region(shape, box=(low, size))))
        else:
            own = [run[begin : begin + length] for run, begin, length in zip(index, low, size, strict=True)]
            found += [Part(name, part, Region(shape, box=box)) for box, part in boxes(view, own)]
    return found


def begin(name: str, whole: Any) -> int:
    """Where in the row-major whole lies what this process holds of it, which has to be one stretch of it.

    Raises:
        ValueError: it is several.
    """
    if not is_dtensor(whole):
        return 0
    first, stride, _ = place(name, whole)
    if stride:
        raise ValueError(f"{name} is placed {whole.placements}, which cuts the blocks of its codes: keep its states in "
                         "another storage, or cut it along its first dimension alone")
    return first
