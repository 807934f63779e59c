"""Stepping each parameter as its gradient arrives, so that not all gradients exist at once."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor


class Arrival:
    """Hooks on the parameters of an optimizer; `remove` takes them away.

    Attributes:
        every: a parameter is stepped when so many gradients have been accumulated into it.
    """

    def __init__(self, optimizer: Any, every: int):
        if every < 1:
            raise ValueError(f"accumulation is {every}: give the number of backward passes of a step, at least 1")
        self.every = every
        self._optimizer = weakref.ref(optimizer)
        self._seen: dict[int, int] = {}
        self._handles = [p.register_post_accumulate_grad_hook(self._arrived)
                         for group in optimizer.param_groups for p in group["params"] if p.requires_grad]

    def _arrived(self, p: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        self._seen[id(p)] = seen = self._seen.get(id(p), 0) + 1
        if seen % self.every == 0:
            optimizer._step_only(p)
            p.grad = None

    def remove(self) -> None:
        """Go back to stepping all parameters in `step`."""
        for handle in self._handles:
            handle.remove()
        optimizer = self._optimizer()
        if optimizer is not None and optimizer.arriving is self:
            optimizer.arriving = None
