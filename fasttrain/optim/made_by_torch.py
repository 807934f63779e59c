"""Optimizers of which torch has one of the same name that makes their states."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fasttrain.optim.optimizer import Optimizer


class MadeByTorch(Optimizer):
    """Base of a page whose second base is torch's class: states have torch's keys, dtypes and devices."""

    counts_steps = True
    _init_group: Callable[..., Any]  # torch's

    def init_state(self, p, group, rule):
        made = not self.state[p]
        if made or group["differentiable"]:  # torch's own function, which also raises torch's own errors
            lists = len(inspect.signature(self._init_group).parameters) - 1
            self._init_group({**group, "params": [p]}, *([] for _ in range(lists)))
        return made
