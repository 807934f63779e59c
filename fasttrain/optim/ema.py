"""The exponential moving average of the parameters: what the kernels do not do for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fasttrain.optim.kept import EMA


@torch.no_grad()
def follow_resting(optimizer: Any, group: dict[str, Any]) -> None:
    """Move the EMA of parameters that had no gradient in this step: they rest, and their average approaches them."""
    for p in group["params"]:
        if p.grad is None and EMA in optimizer.state.get(p, ()):
            average = optimizer.state[p][EMA]
            average.mul_(group["ema_decay"]).add_(p, alpha=1.0 - group["ema_decay"])


@contextmanager
def weights(optimizer: Any) -> Iterator[None]:
    """The parameters hold their EMA inside the block; those without one are as they are."""
    if optimizer._swapped:
        raise RuntimeError("the parameters are their EMA already: ema_weights() is inside another")
    if all(group.get("ema_decay") is None for group in optimizer.param_groups):
        raise RuntimeError("no parameter group has an ema_decay: give the optimizer ema_decay=0.999, for example")
    with torch.no_grad():
        # `data` is exchanged, not overwritten: version counters stay, so that nobody takes this for another weight.
        own = [(p, p.data, optimizer.state[p][EMA].to(p.dtype)) for group in optimizer.param_groups
               for p in group["params"] if EMA in optimizer.state.get(p, ())]
        for p, _, average in own:
            p.data = average
    optimizer._swapped = True
    try:
        yield
    finally:
        optimizer._swapped = False
        for p, before, _ in own:
            p.data = before
