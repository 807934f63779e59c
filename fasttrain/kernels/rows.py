"""Rows of a matrix taken by index, and added up again: what sends tokens to their experts and brings them back.

A *slot* is a row that an expert works on. ``tokens`` says which token a slot holds, ``places`` which slots a token has,
one for each of its choices; no two choices share one. So either way every row is read by index and written once: no
atomic additions, and sums in the order of choices, the same bits in every run. Index -1 is none: a slot without a
token is zero, a choice without a slot adds nothing. Sums are in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fasttrain.kernels import dispatch

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)  # by Triton


def take(rows: Tensor, tokens: Tensor, factors: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Slots (S, C) from rows (N, C): ``rows[tokens[s]]``, times ``factors[s]`` if there are any.

    Example:
        >>> take(torch.tensor([[1.0], [2.0]]), torch.tensor([1, -1, 0, 1])).flatten()
        tensor([2., 0., 1., 2.])
    """
    return _choose(TAKE, rows, backend)(rows, tokens, factors)


def combine(slots: Tensor, places: Tensor, weights: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Rows (N, C) from slots (S, C): the sum over j of ``weights[n, j] * slots[places[n, j]]``; None: all are one.

    Example:
        >>> combine(torch.tensor([[1.0], [10.0]]), torch.tensor([[0, 1], [-1, 1]]), torch.tensor([[1.0, 2.0]] * 2))
        tensor([[21.],
                [20.]])
    """
    return _choose(COMBINE, slots, backend)(slots, places, weights)


def products(rows: Tensor, slots: Tensor, places: Tensor, backend: str | None = None) -> Tensor:
    """The derivative by the weights of `combine`: (N, k) inner products of ``rows[n]`` and ``slots[places[n, j]]``.

    Example:
        >>> products(torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[0, -1]]))
        tensor([[10.,  0.]])
    """
    return _choose(PRODUCTS, rows, backend)(rows, slots, places)


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which numbers of this dtype are added."""
    return torch.promote_types(dtype, torch.float32)


def _choose(table: dict[str, Callable[..., Tensor]], rows: Tensor, backend: str | None) -> Callable[..., Tensor]:
    if backend is None:  # in CPU memory nothing needs the others
        on_cpu = rows.device.type == "cpu" or rows.dtype not in SUPPORTED
        backend = "reference" if on_cpu else dispatch.choose(rows.device)
    return dispatch.choose_from(table, backend, rows.device)


# --- Eager torch ------------------------------------------------------------------------------------------------------

def _found(slots: Tensor, index: Tensor) -> Tensor:
    """The slot of each index; zero where there is none."""
    if len(slots) == 0:
        return slots.new_zeros(len(index), slots.shape[1])
    found = slots.index_select(0, index.clamp_min(0))
    none = index < 0
    return found if none.device.type == "cpu" and not none.any() else found.masked_fill_(none[:, None], 0)


def _take_reference(rows: Tensor, tokens: Tensor, factors: Tensor | None) -> Tensor:
    found = _found(rows, tokens)
    return found if factors is None else found.to(wide(rows.dtype)).mul_(factors[:, None]).to(rows.dtype)


def _combine_reference(slots: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    total = slots.new_zeros(len(places), slots.shape[1], dtype=wide(slots.dtype))
    for choice in range(places.shape[1]):
        found = _found(slots, places[:, choice]).to(total.dtype)
        total += found if weights is None else found.mul_(weights[:, choice, None])
    return total.to(slots.dtype)


def _products_reference(rows: Tensor, slots: Tensor, places: Tensor) -> Tensor:
    rows = rows.to(wide(rows.dtype))
    return torch.stack([(rows * _found(slots, index).to(rows.dtype)).sum(1) for index in places.unbind(1)], 1)


TAKE: dict[str, Callable[..., Tensor]] = {"reference": _take_reference}
COMBINE: dict[str, Callable[..., Tensor]] = {"reference": _combine_reference}
PRODUCTS: dict[str, Callable[..., Tensor]] = {"reference": _products_reference}
