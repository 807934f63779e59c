"""The exponential moving average of the parameters: what the kernels do not do for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fasttrain.optim.kept import EMA
from fasttrain.optim.local import is_dtensor, local


@torch.no_grad()
def follow_resting(optimizer: Any, group: dict[str, Any]) -> None:
    """Move the EMA of parameters that had no gradient in this step: they rest, and their average approaches them."""
    for p in group["params"]:
        if p.grad is None and EMA in optimizer.state.get(p, ()):
            average, now = local(optimizer.state[p][EMA]), local(p)
            kind = torch.promote_types(average.dtype, torch.float32)  # each operation rounds once, wherever it is run
            average.copy_(average.to(kind).mul(group["ema_decay"]).add_(now.to(kind).mul(1.0 - group["ema_decay"])))


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
        before = [_exchange(p, average) for p, average in own]
    optimizer._swapped = True
    try:
        yield
    finally:
        optimizer._swapped = False
        for (p, _), data in zip(own, before, strict=True):
            _put_back(p, data)


def _exchange(p: Any, average: Any) -> torch.Tensor:
    """Give a parameter the values of its average; what it was. Version counters stay, so that nobody takes this for
    another weight: `data` does not count."""
    if not is_dtensor(p):
        before = p.data
        p.data = average.to(p.dtype)
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
