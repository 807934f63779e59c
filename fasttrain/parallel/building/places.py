"""Where the elements that a process holds lie in the whole tensor, some at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fasttrain.optim.local import local, positions

AT_ONCE = {"cpu": 1 << 16}  # elements that are drawn together: what fits into a cache
AT_ONCE_ELSEWHERE = 1 << 22


def indices(tensor: Any, device: torch.device, at_once: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """(which elements of the flat local part, their row-major places in the whole), one after the other.

    Arguments:
        tensor: plain, or a DTensor of any placements without Partial; its local part may be on meta.
        device: of what is given.

    Example:
        >>> [(at, places.tolist()) for at, places in indices(torch.empty(2, 2), torch.device("cpu"), 3)]
        [(slice(0, 3, None), [0, 1, 2]), (slice(3, 4, None), [3])]
    """
    at_once = at_once or AT_ONCE.get(device.type, AT_ONCE_ELSEWHERE)
    count, shape = local(tensor).numel(), tensor.shape
    held = positions(tensor) if count else []
    cut = [dim for dim, index in enumerate(held) if len(index) != shape[dim]]
    run = math.prod(shape[cut[-1] + 1:]) if cut else max(count, 1)  # elements that follow one another, at least
    tables, stride = [], run
    for dim in reversed(range(cut[-1] + 1 if cut else 0)):
        tables.append((held[dim] * stride).to(device))
        stride *= shape[dim]
    if len(tables) == 1 and torch.equal(held[0], torch.arange(len(held[0])) + held[0][0]):  # some rows: one run
        tables, run, first = [], count, int(held[0][0]) * run
    else:
        first = 0
    for begin in range(0, count, at_once):
        place = torch.arange(begin, min(begin + at_once, count), device=device)
        if tables:
            outer, found = place // run, place % run
            for table in tables:
                found += table[outer % len(table)]
                outer = outer // len(table)
        else:
            found = place + first
        yield slice(begin, begin + len(place)), found
