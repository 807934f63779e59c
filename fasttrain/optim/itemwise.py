"""The base of optimizers that are no one rule over elements: they step items, without the native plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels.item import Item
from fasttrain.optim.checks import check_counter, check_gradient, plain, reals
from fasttrain.optim.examine import Examined, counted
from fasttrain.optim.local import check_placed, dtensor_type, is_dtensor, local, settle, shares
from fasttrain.optim.optimizer import Optimizer
from fasttrain.optim.page import Group
from fasttrain.optim.report import StepReport
from fasttrain.rule import Rule


class Itemwise(Optimizer):
    """An `Optimizer` whose parameters are examined in Python, in full only where something changed since the last step.

    A page overrides `_runs`, which gets an item for each parameter, and says how the states are checked (`_states`). Of
    a DTensor the item has the local parts. What those need of one another is the page's to add or to gather, and every
    process that holds parts has to come to it (`_meeting`).
    """

    _memo: dict[Tensor, tuple[Any, ...]] | None = None

    def _states(self, name: str, p: Tensor, rule: Rule) -> tuple[str, ...]:
        """The names of the states in the order of the item's tensors, each checked to fit the parameter."""
        assert p.grad is not None
        reals(name, local(p), local(p.grad), rule.state, {key: local(value) for key, value in self.state[p].items()})
        return rule.state

    def _counts(self, rule: Rule) -> bool:
        """Whether the parameters of a rule have a step count."""
        return self.counts_steps

    def _refuse(self, p: Tensor) -> None:
        """Raise if the optimizer cannot take a parameter."""

    def not_driven(self) -> str | None:
        return f"{type(self).__name__} has stages between which the host counts"

    def takes_storage(self, group: Group) -> bool:
        return False

    def _meeting(self, examined: Sequence[Examined]) -> list[tuple[int, int]]:
        """Where the parameters are of which other processes hold other parts, the same on each of these processes.

        Those without a gradient here are among them, since others may have one. On arrival it is the one that arrived.
        """
        if dtensor_type() is None:
            return []
        places = [(g, i) for g, group in enumerate(self.param_groups) for i in range(len(group["params"]))] \
            if self.arriving is None else [one.where for one in examined]
        return [where for where in places if shares(self._param(where))]

    def _examine(self, where: tuple[int, int], rule: Rule, report: StepReport,
                 steps_of: Callable[[Tensor, StepReport], float] | None = None) -> Examined:
        p, group = self._param(where), self.param_groups[where[0]]
        distributed = is_dtensor(p) or is_dtensor(p.grad)
        own, grad = p, p.grad
        if distributed:
            check_placed(self._name(where), p)
            settle(p)
            own, grad = local(p), local(p.grad)
        assert grad is not None
        memo = self._memo = self._memo if self._memo is not None else {}
        signature = (rule, p.dtype, own.shape, own.stride(), p.device, type(grad), grad.dtype, grad.shape,
                     grad.stride(), grad.device, grad.is_neg())
        known, state = memo.get(p), self.state.get(p)
        if known is not None and known[0] == signature and known[1] is own and state is not None and \
                all((local(state.get(key)) if distributed else state.get(key)) is kept for key, kept in known[2]):
            _, _, _, name, param, states, counter = known
            step = (steps_of or counted)(counter, report) + 1 if counter is not None else 2
            return Examined(where, group, Item(name, rule, (param, grad, *states), (), counter), step, False, None)
        known_states = len(self.state.get(p, ()))
        one = self._examine_in_full(where, rule, memo, signature,
                                    lambda counter: (steps_of or counted)(counter, report))
        report.allocations += len(self.state[p]) - known_states
        return one

    def _examine_in_full(self, where: tuple[int, int], rule: Rule, memo: dict[Tensor, tuple[Any, ...]],
                         signature: tuple[Any, ...], steps_of: Callable[[Tensor], float]) -> Examined:
        group, p, name = self.param_groups[where[0]], self._param(where), self._name(where)
        own, grad = local(p), local(p.grad)
        memo.pop(p, None)
        check_gradient(name, own, grad)
        self._refuse(p)
        tensors = reals(name, own, grad, (), {})
        fresh = self.init_state(p, group, rule)
        keys = self._states(name, p, rule)
        state = {key: local(value) for key, value in self.state[p].items()}
        states = tuple(plain(torch.view_as_real(state[key]) if p.is_complex() else state[key]) for key in keys)
        counter = None
        if self._counts(rule):
            check_counter(name, state.get("step"))
            counter = plain(state["step"])
        if type(grad) is Tensor and not (p.is_complex() or signature[-1]):
            kept = [(key, state[key]) for key in (*keys, *(("step",) if counter is not None else ()))]
            memo[p] = signature, own, kept, name, tensors[0], states, counter
        step = steps_of(counter) + 1 if counter is not None else 1 if fresh else 2
        return Examined(where, group, Item(name, rule, (*tensors, *states), (), counter), step, fresh, None)

    def _describe(self, index: int, one: Examined) -> bool:
        return False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._memo = None

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        self._memo = None  # names count groups
