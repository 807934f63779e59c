"""Rows of a matrix taken by index, and added up again: what sends tokens to their experts and brings them back.

A *slot* is a row that an expert works on, an *origin* the choice it is for: choice j of token n has the number
``n * choices + j``. ``origins`` says which each slot is for, ``places`` in which slot each choice is; no two share one.
So either way every row is read by index and written once: no atomic additions, and sums in the order of choices, the
same bits in every run. -1 is none: a slot that is for no choice is zero, a choice without a slot adds nothing. Sums are
in float32 (float64 for float64).

`take` and `combine` are the same bits on every backend; the inner products of `differentiate` are summed in another
order by Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels import dispatch

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)  # by Triton


def take(rows: Tensor, origins: Tensor, choices: int, backend: str | None = None) -> Tensor:
    """Slots (S, C) from rows (N, C), contiguous both: that of the token that each slot is for.

    Example:
        >>> take(torch.tensor([[1.0], [2.0]]), torch.tensor([3, -1, 0, 1]), choices=2).flatten()
        tensor([2., 0., 1., 1.])
    """
    return _choose(TAKE, rows, backend)(rows, origins, choices)


def combine(slots: Tensor, places: Tensor, weights: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Rows (N, C) from slots (S, C): the sum over j of ``weights[n, j] * slots[places[n, j]]``; None: all are one.

    Example:
        >>> combine(torch.tensor([[1.0], [10.0]]), torch.tensor([[0, 1], [-1, 1]]), torch.tensor([[1.0, 2.0]] * 2))
        tensor([[21.],
                [20.]])
    """
    return _choose(COMBINE, slots, backend)(slots, places, weights)


def differentiate(grad: Tensor, slots: Tensor, origins: Tensor, weights: Tensor,
                  backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The derivatives of `combine` by slots (S, C) and by weights (N, k), given that by its rows, (N, C); in one pass.

    Example:
        >>> grad, slots = torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, 4.0]])
        >>> differentiate(grad, slots, torch.tensor([1]), torch.tensor([[0.5, 10.0]]))
        (tensor([[20., 10.]]), tensor([[ 0., 10.]]))
    """
    return _choose(DIFFERENTIATE, grad, backend)(grad, slots, origins, weights)


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which numbers of this dtype are added."""
    return torch.promote_types(dtype, torch.float32)


def _choose(table: dict[str, Callable[..., Any]], rows: Tensor, backend: str | None) -> Callable[..., Any]:
    if backend is None:  # in CPU memory nothing needs the others
        plain = rows.device.type == "cpu" or rows.dtype not in SUPPORTED
        backend = "reference" if plain else dispatch.choose(rows.device)
    return dispatch.choose_from(table, backend, rows.device)


# --- Triton -----------------------------------------------------------------------------------------------------------

def _take_triton(*arguments: Any) -> Tensor:
    return dispatch.part("triton_rows").take(*arguments)


def _combine_triton(*arguments: Any) -> Tensor:
    return dispatch.part("triton_rows").combine(*arguments)


def _differentiate_triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    return dispatch.part("triton_rows").differentiate(*arguments)


# --- Eager torch ------------------------------------------------------------------------------------------------------

def _found(rows: Tensor, index: Tensor) -> Tensor:
    """The row of each index; zero where there is none."""
    if len(rows) == 0:
        return rows.new_zeros(len(index), rows.shape[1])
    found, none = rows.index_select(0, index.clamp_min(0)), index < 0
    return found if none.device.type == "cpu" and not none.any() else found.masked_fill_(none[:, None], 0)


def _take_reference(rows: Tensor, origins: Tensor, choices: int) -> Tensor:
    return _found(rows, origins.div(choices, rounding_mode="floor"))


def _combine_reference(slots: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    total = slots.new_zeros(len(places), slots.shape[1], dtype=wide(slots.dtype))
    for choice in range(places.shape[1]):
        found = _found(slots, places[:, choice]).to(total.dtype)
        total += found if weights is None else found.mul_(weights[:, choice, None])
    return total.to(slots.dtype)


def _differentiate_reference(grad: Tensor, slots: Tensor, origins: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    exact = wide(grad.dtype)
    found = _take_reference(grad, origins, weights.shape[1]).to(exact)
    by_weights = weights.new_zeros(weights.numel() + 1, dtype=exact)  # the last for slots that are for no choice
    by_weights[torch.where(origins < 0, weights.numel(), origins)] = (found * slots.to(exact)).sum(1)
    factors = _found(weights.reshape(-1, 1), origins)
    return found.mul_(factors).to(grad.dtype), by_weights[:-1].view(weights.shape)


TAKE: dict[str, Callable[..., Any]] = {"triton": _take_triton, "reference": _take_reference}
COMBINE: dict[str, Callable[..., Any]] = {"triton": _combine_triton, "reference": _combine_reference}
DIFFERENTIATE: dict[str, Callable[..., Any]] = {"triton": _differentiate_triton, "reference": _differentiate_reference}
