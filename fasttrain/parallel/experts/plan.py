"""Which slot of an expert each choice of a token gets."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """Slots in the order of experts, and what they are for: see `fasttrain.kernels.rows`.

    Attributes:
        origins: (slots,) the choice that each slot is for, ``token * top_k + choice``; -1: none.
        places: (tokens, top_k) the slot of each choice, -1 if it was dropped.
        counts: (experts,) slots with a token, of each expert.
    """

    origins: Tensor
    places: Tensor
    counts: Tensor


def dropless(chosen: Tensor, experts: int) -> Plan:
    """As many slots as there are choices; those of an expert lie together, in the order of tokens.

    Example:
        >>> plan = dropless(torch.tensor([[1, 0], [1, 2]]), 3)
        >>> plan.origins.tolist(), plan.places.tolist(), plan.counts.tolist()
        ([1, 0, 2, 3], [[1, 0], [2, 3]], [1, 2, 1])
    """
    order, _, bounds = _sorted(chosen.flatten(), experts)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return Plan(order, places.view(chosen.shape), bounds.diff())


def capped(chosen: Tensor, experts: int, capacity: int) -> Plan:
    """`capacity` slots for each expert: first choices go before second ones, then tokens in their order.

    Nothing waits for the device, as sizes do not depend on what was chosen.

    Example:
        >>> plan = capped(torch.tensor([[1, 0], [1, 2]]), 3, 1)
        >>> plan.origins.tolist(), plan.places.tolist(), plan.counts.tolist()
        ([1, 0, 3], [[1, 0], [-1, 2]], [1, 1, 1])

    Reference: Lepikhin et al., GShard, arXiv 2006.16668, algorithm 1, where a rank's tokens are a group.
    """
    (tokens, choices), slots = chosen.shape, experts * capacity
    order, by_expert, bounds = _sorted(chosen.t().flatten(), experts)
    position = torch.arange(len(order), device=order.device) - bounds[by_expert]
    slot = torch.where(position < capacity, by_expert * capacity + position, -1)
    places = torch.empty_like(order)
    places[order] = slot
    found = order.new_full((slots + 1,), -1)  # the last for all that are dropped
    found[torch.where(slot < 0, slots, slot)] = order % max(tokens, 1) * choices + order // max(tokens, 1)
    return Plan(found[:slots], places.view(choices, tokens).t().contiguous(), bounds.diff().clamp_max(capacity))


def capacity_of(factor: float, tokens: int, choices: int, experts: int) -> int:
    """Slots for each expert: `factor` times what it gets if all get alike, and one at least.

    Example:
        >>> capacity_of(1.25, tokens=64, choices=2, experts=8)
        20
    """
    return max(1, math.ceil(factor * tokens * choices / experts))


def by_expert(received: Tensor, total: int) -> Plan:
    """The way from rows in the order of ranks, then of experts, to the order of experts, then of ranks.

    Arguments:
        received: (ranks, experts) how many rows there are of each.
        total: of all of them.
    """
    ranks, experts = received.shape
    kinds = torch.arange(experts, device=received.device).repeat(ranks)
    return dropless(torch.repeat_interleave(kinds, received.flatten(), output_size=total)[:, None], experts)


def _sorted(experts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(the order that sorts them, stable; sorted; where each of `count` begins, and the end)."""
    ordered, order = torch.sort(experts, stable=True)
    return order, ordered, torch.searchsorted(ordered, torch.arange(count + 1, device=experts.device))
