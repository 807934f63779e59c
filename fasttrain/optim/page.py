"""What the class of an optimizer says: its equation, and whatever else it has different from the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels.trace import trace
from fasttrain.optim import kept
from fasttrain.optim.checks import number
from fasttrain.optim.equation import EQUATION, reads_step
from fasttrain.precision.storage import is_plain
from fasttrain.rule import Rule

Group = dict[str, Any]
LATE = 1000  # a step at which a state retains what it always will, for averages that begin by forgetting


class Page(torch.optim.Optimizer):
    """What a page may say differently; `fasttrain.optim.Optimizer` describes what it must say."""

    rules: tuple[Rule, ...] = ()
    counts_steps = False  # whether the optimizer's state has torch's `step`
    running: tuple[str, ...] = ()  # states of one number for each parameter, which `advance` replaces
    running_of_groups: tuple[str, ...] = ()  # numbers of a parameter group, which `stepped` replaces
    advancing: Rule | None = None  # what a device advances either with (`advanced`): its coefficients, beside a step's
    advances_first: bool = False  # before `coefficients` of the step reads them

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Make the rule of a page that gives an equation. Steps are counted where its `coefficients` read them."""
        super().__init_subclass__(**keywords)
        own = {"state", "coefficients", "element", "positive", "retain", "exact"} & vars(cls).keys()
        if "rules" in vars(cls) or not own or not hasattr(cls, "element"):
            return
        for part in ("state", "coefficients"):
            if not hasattr(cls, part):
                raise TypeError(f"class {cls.__name__} has no `{part}`: {EQUATION}")
        cls.rules = (Rule.of(cls),)
        if "counts_steps" not in vars(cls):
            cls.counts_steps = cls.counts_steps or reads_step(cls.rules[0])

    def rule_of(self, group: Group) -> Rule:
        """The rule that the options of a group select."""
        return self.rules[0]

    def init_state(self, p: Tensor, group: Group, rule: Rule) -> bool:
        """Make the states that `p` lacks; True if any was made."""
        if self.counts_steps and "step" not in self.state[p]:
            self.state[p]["step"] = torch.zeros((), dtype=torch.float32)
        missing = [name for name in rule.state if self.state[p].get(name) is None]
        for name in missing:
            self.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return bool(missing)

    def step_sparse(self, p: Tensor, grad: Tensor, group: Group) -> None:
        """Step a parameter whose gradient is sparse."""
        raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")

    def advance(self, state: dict[str, Any], group: Group, step: float) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The numbers of `running` that `coefficients` reads in a step, and those that are kept after it.

        The first are in double precision. `state` has the numbers of `running` only, and is not changed here: equal
        numbers are advanced once for all parameters of a group and step that have them.
        """
        raise NotImplementedError

    def not_driven(self) -> str | None:
        """Why a device cannot drive a step of this optimizer, or None if it can (`fasttrain.optim.drive`)."""
        if self.advancing is not None:
            return None
        if self.running:
            return f"{type(self).__name__} advances {', '.join(self.running)} on the host (it has no `advancing`)"
        own = [name for name in ("stepped", "_row") if getattr(type(self), name) is not getattr(Page, name)]
        return f"{type(self).__name__} has a method {own[0]}(), which runs on the host" if own else None

    def advanced(self, before: Mapping[str, Tensor], by: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Running numbers after a step that a device drives, of the types that they had before.

        Arguments:
            before: for each of them one number of every line (a group, or a group and step count).
            by: the coefficients of `advancing`, float64, one number of every line.
        """
        return {name: by[name].to(old.dtype) for name, old in before.items()}

    def takes_storage(self, group: Group) -> bool:
        """Whether storage options apply to a group: they do where one elementwise rule steps it."""
        return True

    def stepped(self) -> None:
        """Called after every step that was made: not after one that was skipped or raised."""

    def loaded_shapes(self, p: Tensor, group: Group) -> dict[str, tuple[int, ...] | None]:
        """The entries that a loaded state of `p` must have, and their shapes; None: any shape."""
        rule = self.rule_of(group)
        shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys((*(("step",) if self.counts_steps else ()),
                                                                   *self.running))
        if is_plain(group):
            return shapes | dict.fromkeys(rule.state, tuple(p.shape))
        return shapes | self._layout("a parameter", p, p.dtype, group, rule).shapes(p.shape)

    def _layout(self, name: str, p: Tensor, grad_dtype: torch.dtype, group: Group, rule: Rule) -> kept.Layout:
        """How the options of a group keep a parameter."""
        retained = {}
        if rule.retain:
            known = {**dict.fromkeys(self.running, math.nan), **group}  # these are not known: nor what depends on them
            retained = rule.scalars(LATE, {key: number(known[key]) for key in rule.hyperparameters})
        return kept.layout(name, p, grad_dtype, group, rule, retained)

    def _hyperparameters(self, rule: Rule, group: Group) -> dict[str, Any]:
        """What the `coefficients` of a rule take, as the group has it."""
        return {name: group[name] for name in rule.hyperparameters}

    def _row(self, rule: Rule, group: Group, step: float, scale: float) -> list[float]:
        """The gradient's scale, the coefficients of one group and step count, and the tail where there is one."""
        numbers = {name: number(value) for name, value in self._hyperparameters(rule, group).items()}
        row = [-scale if group.get("maximize") else scale, *trace(rule).row(int(step), numbers)]
        if is_plain(group):
            return row
        decay, largest = group.get("ema_decay"), group.get("clip_value")
        keep, add = (1.0, 0.0) if decay is None else (decay, 1.0 - decay)
        return [*row, math.inf if largest is None else largest, keep, add]
