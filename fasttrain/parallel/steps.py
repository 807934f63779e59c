"""Before an optimizer steps, the gradients of its parameters are reduced: by the backward pass, or now.

A rank whose backward pass reached no parameter, or that stayed under `no_sync`, would otherwise step alone while the
others wait. One hook of torch's, for all optimizers, asks each reducer that shares parameters with the optimizer.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

_reducers: weakref.WeakSet[Any] = weakref.WeakSet()
_known: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Seen] = weakref.WeakKeyDictionary()
_hook: Any = None


class _Seen:
    """The reducers of an optimizer's parameters, and the step of each that it has made."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        own = set(self.params)
        self.reducers = [weakref.ref(reducer) for reducer in _reducers if not own.isdisjoint(reducer.params)]
        self.sequence = [-1] * len(self.reducers)


def watch(reducer: Any) -> None:
    """Ask this reducer before any optimizer steps its parameters."""
    global _hook
    _reducers.add(reducer)
    _known.clear()
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_before)


def forget(reducer: Any) -> None:
    """Do so no longer."""
    global _hook
    _reducers.discard(reducer)
    _known.clear()
    if not _reducers and _hook is not None:
        _hook.remove()
        _hook = None


def _before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    seen = _known.get(optimizer)
    if seen is None or len(seen.params) != sum(len(group["params"]) for group in optimizer.param_groups):
        seen = _known[optimizer] = _Seen(optimizer)
    for index, reference in enumerate(seen.reducers):
        reducer = reference()
        if reducer is None:
            continue
        if reducer.sequence == max(seen.sequence[index], 0):
            reducer.finish()
        seen.sequence[index] = reducer.sequence
        reducer.before_step()
