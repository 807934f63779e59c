"""The units in which torch's `fully_shard` gathers and reduces parameters, and a reduction that waits until it is told.

torch has no name of its own for this: what `torch.distributed.pipelining` calls on a stage that is sharded stands here,
and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def states(model: nn.Module) -> list[Any]:
    """What torch keeps of each module that is sharded, the outermost first."""
    found = {id(state): state for part in model.modules() if isinstance(part, FSDPModule)
             if (state := part._get_fsdp_state()) is not None}
    return list(found.values())


def units(state: Any) -> list[Any]:
    """The parameters of a module that travel together; torch 2.11 has one such group at most."""
    several = getattr(state, "_fsdp_param_groups", None)
    return list(several) if several is not None else [one for one in (state._fsdp_param_group,) if one is not None]


class Later:
    """Backward passes of a sharded model that only accumulate, in whatever parts, and a reduction afterwards.

    Parameters stay gathered meanwhile: a schedule that divides backward looks for those with which forward ran.

    Arguments:
        model: on which `fully_shard` was called.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._complete: set[int] = set()  # parameters, by identity
        self._reduced: set[int] = set()   # units
        self._held: list[Any] = []        # so that identities stay theirs

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is reduced, and nothing let go of, within."""
        before = [(unit, unit.post_forward_mesh_info) for state in states(self.model) for unit in units(state)]
        self._set(False)
        for unit, _ in before:
            unit.post_forward_mesh_info = None  # not reshard_after_forward
        try:
            yield
        finally:
            self._set(True)
            for unit, kept in before:
                unit.post_forward_mesh_info = kept

    def reduce(self, params: Iterable[Tensor] | None = None) -> None:
        """Reduce the units of which all trained parameters have been given (None: all that are left)."""
        if params is not None:
            given = list(params)
            self._held += given
            self._complete.update(map(id, given))
        for state in reversed(self._used()):
            for unit in reversed(units(state)):
                if id(unit) not in self._reduced and (params is None or all(
                        self._complete & _ids(kept) for kept in unit.fsdp_params if kept.sharded_param.requires_grad)):
                    self._reduced.add(id(unit))
                    _reduce(unit)

    def finish(self) -> None:
        """Reduce what is left, and end the step: the gradients are there."""
        self.reduce()
        for state in self._used():
            if state._is_root:
                state._root_post_backward_final_callback()
        self._complete, self._reduced, self._held = set(), set(), []

    def _used(self) -> list[Any]:
        """Those that a forward pass has come to."""
        return [state for state in states(self.model) if state._is_root is not None]

    def _set(self, on: bool) -> None:
        for part in self.model.modules():
            if isinstance(part, FSDPModule):
                part.set_is_last_backward(on)
                part.set_requires_gradient_sync(on, recurse=False)
                part.set_reshard_after_backward(on, recurse=False)


def _reduce(unit: Any) -> None:
    """Reduce what has accumulated in a unit, also where nothing else is to be reduced yet."""
    before = unit.reduce_grads, unit.all_reduce_grads, unit.reshard_after_backward
    unit.reduce_grads = unit.all_reduce_grads = unit.reshard_after_backward = True
    try:
        unit.post_backward()
    finally:
        unit.reduce_grads, unit.all_reduce_grads, unit.reshard_after_backward = before


def _ids(kept: Any) -> set[int]:
    """By which identities a parameter may be named: that of its shard, and that of the whole while it is gathered."""
    return {id(one) for one in (kept.sharded_param, getattr(kept, "_unsharded_param", None)) if one is not None}
