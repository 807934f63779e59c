"""Schedules on an optimizer: a torch `LRScheduler` whose values are a pure function of its step count."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from fasttrain.schedules.plateau import Plateau
from fasttrain.schedules.schedule import Schedule, as_schedule

SHARES = ("lr", "weight_decay")  # their schedules multiply what the group has; all others say the value itself


class Scheduler(LRScheduler):
    """Has hyperparameters of an optimizer follow schedules. Call `step` after each step of the optimizer.

    Values are written as floats into the parameter groups: nothing waits for a device, and a `StepGraph` sends them to
    it before a replay. They are set when it is built, after `step`, after `load_state_dict`, and after that of the
    optimizer: whichever of the two is built or loaded first, every step has the same values as in a run that was not
    interrupted.

    **A step that a loss scaler skips counts**, if `step` is called after it: the schedule belongs to the number of the
    step, on every process the same, and nobody has to ask the device whether it was made.

    Arguments:
        optimizer: of this package, of torch, or a `fasttrain.parallel.Zero`.
        lr: the share of each group's own learning rate; a schedule of `fasttrain.schedules`, a function of the step, or
            a number. For each group another: a list of these, or a dict by the group's number or "name"; None, and
            groups that are not in the dict, stay.
        momentum: the value itself, of `momentum`, or of the first of `betas` in groups without one.
        weight_decay: the share of each group's own, so that groups without decay have none.
        plateau: multiplies the learning rate; call ``plateau.update(metric)``.
        changed: what to do when a state is loaded that another schedule, or another learning rate of a group, was
            saved with. "raise"; "step": go on at the same step of the new; "share": at the same share of its length.
            The last two warn, and say where.
        others: other hyperparameters of the groups that are numbers, as ``ema_decay=`` or ``clip_value=``: the value.
        last_epoch: the step to begin at is `last_epoch + 1`, as in torch.

    Attributes:
        last_epoch: the step that the values are for.

    Raises:
        TypeError, ValueError: what was given is no schedule, or groups have no such number.

    Example:
        >>> from fasttrain.optim import AdamW
        >>> from fasttrain.schedules import cosine, linear, warmup
        >>> optimizer = AdamW([torch.nn.Parameter(torch.ones(2))], lr=1e-3)
        >>> scheduler = Scheduler(optimizer, lr=warmup(2) + cosine(8), momentum=linear(10, start=0.95, end=0.85))
        >>> for _ in range(6):
        ...     optimizer.step()
        ...     scheduler.step()
        >>> optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]
        (0.0005, (0.89, 0.999))
        >>> scheduler.state_dict()["step"]
        6
    """

    def __init__(self, optimizer: torch.optim.Optimizer, lr: Any = None, *, momentum: Any = None,
                 weight_decay: Any = None, plateau: Plateau | None = None,
                 changed: Literal["raise", "step", "share"] = "raise", last_epoch: int = -1, **others: Any):
        # torch's constructor is not called: it would wrap the optimizer's step, only to warn about the order of calls.
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not an optimizer")
        if changed not in ("raise", "step", "share"):
            raise ValueError(f"changed={changed!r} is none of 'raise', 'step', 'share'")
        given = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, **others}
        self.optimizer, self.plateau, self.changed = optimizer, plateau, changed
        self.schedules: dict[str, list[Schedule | None] | Schedule] = {
            name: self._by_group(name, one) for name, one in given.items() if one is not None}
        if not self.schedules and plateau is None:
            raise ValueError("no schedule is given: lr=, momentum=, weight_decay=, or another number of the groups")
        self.bases: list[dict[str, float]] = []
        self._plans: list[list[tuple[str, Schedule | None]]] = []  # of each group
        for index in range(len(optimizer.param_groups)):
            self._base(index)
        self._check()
        self._step_count = 1
        self._last_lr: list[float | Tensor] = []
        self._apply(last_epoch + 1)
        self._listen()

    def _listen(self) -> None:
        me = weakref.ref(self)
        self.optimizer.register_load_state_dict_post_hook(lambda _: _again(me))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._listen()  # a copied optimizer has no hooks

    @property
    def base_lrs(self) -> list[float]:  # type: ignore[override]
        """The learning rate of each group that its schedule takes a share of."""
        return [base["lr"] for base in self.bases]

    def step(self, epoch: int | None = None) -> None:
        """Go on to the values of the next step.

        Arguments:
            epoch: go to this step instead.
        """
        self._apply(self.last_epoch + 1 if epoch is None else int(epoch))
        self._step_count += 1

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each group at this step."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def values_at(self, step: int) -> list[dict[str, float]]:
        """For each group the values at a step, without setting them."""
        known: dict[Schedule | None, float] = {None: 1.0}  # a schedule of many groups is computed once
        made = []
        for index in range(len(self.optimizer.param_groups)):
            base, values = self._base(index), {}
            for name, schedule in self._of(index):
                value = known.get(schedule)
                if value is None:
                    value = known[schedule] = schedule(step)  # type: ignore[misc]
                if name in SHARES:
                    value *= base[name]
                    if name == "lr" and self.plateau is not None:
                        value *= self.plateau.share
                if not math.isfinite(value):
                    raise ValueError(f"{name} of parameter group {index} would be {value} at step {step}: {schedule!r}")
                values[name] = value
            made.append(values)
        return made

    # --- Values -------------------------------------------------------------------------------------------------------

    def _by_group(self, name: str, given: Any) -> list[Schedule | None] | Schedule:
        groups = self.optimizer.param_groups
        if isinstance(given, Mapping):
            names = {group["name"]: index for index, group in enumerate(groups) if "name" in group}
            places = {names.get(key, key): one for key, one in given.items()}
            if strange := [key for key in places if key not in range(len(groups))]:
                raise ValueError(f"{name}: there is no parameter group {strange[0]!r}: give numbers below {len(groups)}"
                                 + (f" or names: {', '.join(names)}" if names else ""))
            return [as_schedule(places[i]) if places.get(i) is not None else None for i in range(len(groups))]
        if isinstance(given, Sequence) and not isinstance(given, str):
            if len(given) != len(groups):
                raise ValueError(f"{name}: {len(given)} schedules for {len(groups)} parameter groups: give one "
                                 "for each")
            return [None if one is None else as_schedule(one) for one in given]
        return as_schedule(given)

    def _of(self, index: int) -> list[tuple[str, Schedule | None]]:
        """The schedules of a group by name; None for a learning rate that only a plateau changes."""
        while index >= len(self._plans):
            here = len(self._plans)
            found = [(name, one if isinstance(one, Schedule) else one[here] if here < len(one) else None)
                     for name, one in self.schedules.items()]
            own: list[tuple[str, Schedule | None]] = [(name, one) for name, one in found if one is not None]
            if self.plateau is not None and all(name != "lr" for name, _ in own):
                own.append(("lr", None))
            self._plans.append(own)
        return self._plans[index]

    def _base(self, index: int) -> dict[str, float]:
        """What a group has of its own, which schedules take a share of. Before they change it, where that is known."""
        if index == len(self.bases):
            group = self.optimizer.param_groups[index]
            for name in SHARES:
                if name in group:
                    value = group[name]
                    group.setdefault(f"initial_{name}", value.item() if isinstance(value, Tensor) else value)
            self.bases.append({name: float(group[f"initial_{name}"]) for name in SHARES if name in group})
        return self.bases[index]

    def _check(self) -> None:
        for index, group in enumerate(self.optimizer.param_groups):
            for name, _ in self._of(index):
                if name == "momentum" and ("momentum" in group or "betas" in group):
                    continue
                value = group.get(name)
                if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
                    raise ValueError(f"{name}: parameter group {index} of {type(self.optimizer).__name__} has "
                                     f"{'no such option' if name not in group else f'{name}={value!r}, no number'}")

    def _apply(self, step: int) -> None:
        """Go to a step, and write its values."""
        made, self.last_epoch = self.values_at(step), step
        for group, values in zip(self.optimizer.param_groups, made, strict=True):
            for name, value in values.items():
                if name == "momentum" and "momentum" not in group:
                    group["betas"] = (value, *group["betas"][1:])
                elif isinstance(group[name], Tensor):
                    group[name].fill_(value)
                else:
                    group[name] = value
        self._last_lr = [group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
                         for group in self.optimizer.param_groups]

    # --- State --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """JSON values: the step, the schedules as text, the groups' own rates, and the plateau's state."""
        state: dict[str, Any] = {"step": self.last_epoch, "schedules": self._texts(), "length": self._length(),
                                 "bases": [dict(base) for base in self.bases]}
        return state if self.plateau is None else {**state, "plateau": self.plateau.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, and set the values of that step at once.

        Raises:
            ValueError: it is not the state of a Scheduler; or of other schedules, and `changed` is "raise". Nothing was
                changed.
        """
        if missing := [name for name in ("step", "schedules", "bases") if name not in state_dict]:
            raise ValueError(f"the state has no {', '.join(missing)}: it is not one of a fasttrain.schedules.Scheduler")
        if (self.plateau is None) != ("plateau" not in state_dict):
            raise ValueError("the state was saved " + ("with a plateau, and this Scheduler has none" if
                             self.plateau is None else "without a plateau, and this Scheduler has one"))
        step, bases = int(state_dict["step"]), [dict(base) for base in state_dict["bases"]]
        if different := self._different(state_dict):
            if self.changed == "raise":
                raise ValueError(f"the state was saved with other schedules: {different}. Give the old ones; or to go "
                                 "on with the new, changed='step' or changed='share' (of the length)")
            was, step = step, self._remapped(step, state_dict)
            warnings.warn(f"the schedules have changed: {different}. Step {was} of the old is followed by step {step} "
                          "of the new", stacklevel=2)
            bases = self.bases
        if self.plateau is not None:
            self.plateau.load_state_dict(state_dict["plateau"])
        for index, base in enumerate(bases):
            if index < len(self.bases):
                self.bases[index] = base
        self._apply(step)

    def _texts(self) -> dict[str, Any]:
        return {name: repr(one) if isinstance(one, Schedule) else [one if one is None else repr(one) for one in one]
                for name, one in self.schedules.items()}

    def _different(self, state: Mapping[str, Any]) -> str:
        """What the state has otherwise, in words."""
        was, now = state["schedules"], self._texts()
        told = [f"{name} was {was.get(name)} and is {now.get(name)}" for name in {**was, **now}
                if was.get(name) != now.get(name)]
        told += [f"{name} of group {index} was {before[name]} and is {after.get(name)}"
                 for index, (before, after) in enumerate(zip(state["bases"], self.bases, strict=False))
                 for name in before if before[name] != after.get(name)]
        if len(state["bases"]) > len(self.bases):
            told.append(f"there were {len(state['bases'])} parameter groups and are {len(self.bases)}")
        return "; ".join(told)

    def _remapped(self, step: int, state: Mapping[str, Any]) -> int:
        if self.changed == "step":
            return step
        lengths = state.get("length"), self._length()
        if lengths[0] is None or lengths[1] is None:
            raise ValueError("changed='share' needs schedules with an end, the old and the new: give changed='step'")
        return round(step * lengths[1] / lengths[0])

    def _length(self) -> int | None:
        """The length of the longest schedule of a learning rate, else of the others; None if one has no end."""
        found = [(name, one.length) for index in range(len(self.bases)) for name, one in self._of(index)
                 if one is not None]
        lengths = [length for name, length in found if name == "lr"] or [length for _, length in found]
        return None if None in lengths else max((one for one in lengths if one is not None), default=None)


def _again(reference: weakref.ref[Scheduler]) -> None:
    """The optimizer has loaded a state: its values are those of the schedule's step."""
    scheduler = reference()
    if scheduler is not None:
        scheduler._apply(scheduler.last_epoch)
