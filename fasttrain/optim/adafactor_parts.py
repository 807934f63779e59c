"""Adafactor's step of parameters of which other processes hold other parts, in eager torch.

The passes of `fasttrain.kernels.factored`, and between them sums over all parts, those of all parameters in one
collective: first the squares of the gradient by row and by column, and of the parameter; then the squares of the
update. ``row_var`` and ``col_var`` are whole on every process, and the sums keep them alike; ``variance`` is cut as its
parameter. A matrix costs 8 (rows + columns + 3) bytes in these sums, where its gradient has 4 rows columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain.kernels.factored import Work, _moved
from fasttrain.kernels.reference import square_root
from fasttrain.optim.local import check_given, totals_of_parts, window


class Shared(NamedTuple):
    """A parameter that is shared: how errors call it, and what steps its part here, None without a gradient here."""

    name: str
    p: Any
    work: Work | None

    @property
    def sums(self) -> dict[int, tuple[int, ...]]:
        """The shapes of the whole's sums over the last dimension and over the one before it, if it is factored."""
        shape = tuple(self.p.shape)
        return {-1: (*shape[:-1], 1), -2: (*shape[:-2], 1, shape[-1])} if len(shape) > 1 else {}


def measured(shared: Sequence[Shared]) -> list[Tensor]:
    """Of each parameter, summed over all parts: 1 for each gradient, p^2, and g^2 by row and by column; flat, float64.

    Raises:
        RuntimeError: a parameter has a gradient on some of its processes only.
    """
    totals = totals_of_parts([one.p for one in shared], [_measured(one) for one in shared])
    check_given([(one.name, one.p) for one in shared], [total[0].item() for total in totals],
                "Adafactor keeps sums over all of them")
    return totals


def step(shared: Sequence[Shared], totals: Sequence[Tensor]) -> None:
    """Step the parts that are here; `totals` is from `measured`."""
    stepped = [(one, one.work, _factors(one, one.work, total) if one.p.numel() else None, total)
               for one, total in zip(shared, totals, strict=True) if one.work is not None]
    own = {id(one.p): _update(work, factors).double().square().sum().view(1)
           for one, work, factors, _ in stepped if factors is not None}
    nothing = [torch.zeros(1, dtype=torch.float64, device=one.p.device) for one in shared]
    squares = totals_of_parts([one.p for one in shared],
                              [own.get(id(one.p), zero) for one, zero in zip(shared, nothing, strict=True)])
    square_of = {id(one.p): square for one, square in zip(shared, squares, strict=True)}
    for one, work, factors, total in stepped:
        item, (_, keep, _, rho, _, eps2, clip) = work
        if factors is not None:
            p, (size, length) = item.tensors[0], (total[1], square_of[id(one.p)][0])
            # fmax as Python's max: where one is NaN, the other.
            rate = torch.fmax((size / one.p.numel()).sqrt(), size.new_tensor(eps2)) * rho
            rate = rate / torch.fmax((length / one.p.numel()).sqrt() / clip, size.new_tensor(1.0))
            p.copy_(p.to(item.dtype) * keep - rate.to(item.dtype) * _update(work, factors))
        if item.counter is not None:
            item.counter.add_(1)
    torch.autograd.graph.increment_version([one.p for one, *_ in stepped])


def _gradient(work: Work) -> Tensor:
    item, (scale, *_) = work
    return item.tensors[1].to(item.dtype).double() * scale


def _measured(one: Shared) -> Tensor:
    if one.work is None:
        return torch.zeros(2 + sum(map(math.prod, one.sums.values())), dtype=torch.float64, device=one.p.device)
    p, squares = one.work[0].tensors[0].double(), _gradient(one.work).square()
    parts = [p.new_ones(1), p.square().sum().view(1)]
    index = window(one.p)
    for dim, shape in one.sums.items():
        whole = p.new_zeros(shape)
        whole[_summed(index, dim)] = squares.sum(dim, keepdim=True)
        parts.append(whole.flatten())
    return torch.cat(parts)


def _summed(index: tuple[Any, ...], dim: int) -> tuple[Any, ...]:
    """The index of a sum over a dimension, which has one place there."""
    one_place = slice(None) if isinstance(index[dim], slice) else torch.zeros_like(index[dim][:1])
    return tuple(one_place if place == len(index) + dim else held for place, held in enumerate(index))


def _factors(one: Shared, work: Work, total: Tensor) -> tuple[Tensor, ...]:
    """Move the states; returns what the second moment of the local elements is the product of, float64."""
    item, (_, _, weight, _, eps1, _, _) = work
    if not one.sums:
        return (_moved(item.tensors[2], _gradient(work).square(), weight, item.dtype),)
    index, moved = window(one.p), []
    sums = total[2:].split([math.prod(shape) for shape in one.sums.values()])
    for state, squares, (dim, shape) in zip(item.tensors[2:], sums, one.sums.items(), strict=True):
        moved.append(_moved(state, squares.view(shape) / one.p.shape[dim], weight, item.dtype))
    rows, columns = moved
    rows = rows / rows.mean(-2, keepdim=True).clamp(min=eps1)
    return rows[_summed(index, -1)], columns[_summed(index, -2)]


def _update(work: Work, factors: tuple[Tensor, ...]) -> Tensor:
    """The update of the local elements. It is made twice, so that never those of all parameters are in memory."""
    item, (scale, _, _, _, eps1, _, _) = work
    second = math.prod(factors[1:], start=factors[0])
    return item.tensors[1].to(item.dtype) * scale / square_root(second.to(item.dtype).clamp(min=eps1 * eps1))
