"""The exponential moving average of the parameters: what the kernels do not do for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fasttrain.optim.kept import EMA
from fasttrain.optim.local import is_dtensor, local
from fasttrain.optim.placing import place
from fasttrain.optim.runs import key_of
from fasttrain.precision import draws
from fasttrain.precision.codecs import STOCHASTIC, encode
from fasttrain.precision.storage import ema_codec


@torch.no_grad()
def follow_resting(optimizer: Any, index: int, found: Tensor | None = None) -> None:
    """Move the EMA of parameters of a group that were not stepped: they rest, and their average approaches them.

    It is rounded as a step would do it, with the draws that this step would have taken. Where `found`, a tensor of one
    element, is not zero, they stay.
    """
    group = optimizer.param_groups[index]
    decay = group["ema_decay"]
    keep, add = (decay.double(), 1.0 - decay.double()) if isinstance(decay, Tensor) else (decay, 1.0 - decay)
    for i, p in enumerate(group["params"]):
        if p.grad is None and id(p) not in optimizer._arrived and EMA in optimizer.state.get(p, ()):
            average, now = local(optimizer.state[p][EMA]), local(p)
            kind = torch.promote_types(average.dtype, torch.float32)  # each operation rounds once, wherever it is run
            value = average.to(kind).mul(keep).add_(now.to(kind).mul(add))
            if found is not None:
                value = torch.where(found.to(value.device) != 0, average.to(kind), value)
            number = ema_codec(p.dtype, group)
            bits = _bits(optimizer, (index, i), average) if number & STOCHASTIC else None
            encode(number, value, average, None, bits)


def _bits(optimizer: Any, where: tuple[int, int], average: Tensor) -> Tensor:
    """The random bits of a parameter's EMA in this step."""
    group, p = optimizer.param_groups[where[0]], optimizer._param(where)
    group.setdefault("draws", 0)
    key = draws.parameter_key(key_of(group), optimizer._identity(where))
    at = draws.full_index(place(optimizer._name(where), p), average.numel(), average.device).view(average.shape)
    return draws.random_bits(draws.operand_key(key, 2 + len(optimizer.rule_of(group).state)), at)


@contextmanager
def weights(optimizer: Any) -> Iterator[None]:
    """The parameters hold their EMA inside the block; those without one are as they are."""
    if optimizer._swapped:
        raise RuntimeError("the parameters are their EMA already: ema_weights() is inside another")
    if all(group.get("ema_decay") is None for group in optimizer.param_groups):
        raise RuntimeError("no parameter group has an ema_decay: give the optimizer ema_decay=0.999, for example")
    with torch.no_grad():
        own = [(p, optimizer.state[p][EMA]) for group in optimizer.param_groups for p in group["params"]
               if EMA in optimizer.state.get(p, ())]
    before: list[Tensor] = []
    try:
        with torch.no_grad():
            for p, average in own:
                before.append(_exchange(p, average))
        optimizer._swapped = True
        yield
    finally:
        optimizer._swapped = False
        for (p, _), data in zip(own, before, strict=False):  # fewer, where an exchange failed
            _put_back(p, data)


def _exchange(p: Any, average: Any) -> torch.Tensor:
    """Give a parameter the values of its average; what it was. Version counters stay, so that nobody takes this for
    another weight: `data` does not count."""
    if not is_dtensor(p):
        before = p.data
        p.data = average.to(p.device, p.dtype)
        return before
    here = local(p).data  # a DTensor's memory is known to others (`fully_shard`): the values are exchanged in it
    before = here.clone()
    here.copy_(local(average))
    return before


def _put_back(p: Any, before: torch.Tensor) -> None:
    if is_dtensor(p):
        local(p).data.copy_(before)
    else:
        p.data = before
