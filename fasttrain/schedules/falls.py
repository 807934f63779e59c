"""Pieces that fall by factors, and one through given points; else as `pieces`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from fasttrain.schedules.pieces import WAY
from fasttrain.schedules.schedule import Schedule, finite, one_of, whole


@dataclass(frozen=True, repr=False)
class exponential(Schedule):
    """rate^(t / every): `ExponentialLR`, and `exponential_decay` of optax.

    Arguments:
        rate: positive.
        every: the steps in which the value is multiplied by `rate` once.
        staircase: only whole multiples of `every` count.
        floor: the lowest value (the highest, where `rate` is above 1).

    Example:
        >>> exponential(0.5, every=10)(20)
        0.25
    """

    rate: float
    every: int = 1
    staircase: bool = False
    floor: float | None = None

    def __post_init__(self) -> None:
        whole(self, 1, every=self.every)
        finite(self, rate=self.rate, floor=0.0 if self.floor is None else self.floor)
        if not self.rate > 0:
            raise ValueError(f"exponential: rate={self.rate!r} must be positive")

    def at(self, step: int) -> float:
        value = self.rate ** (step // self.every if self.staircase else step / self.every)
        if self.floor is None:
            return value
        return max(value, self.floor) if self.rate < 1 else min(value, self.floor)


@dataclass(frozen=True, repr=False)
class step_decay(Schedule):
    """Multiplied by `factor` every so many steps: `StepLR`.

    Example:
        >>> [step_decay(10, factor=0.5)(t) for t in (9, 10, 20)]
        [1.0, 0.5, 0.25]
    """

    every: int
    factor: float = 0.1

    def __post_init__(self) -> None:
        whole(self, 1, every=self.every)
        finite(self, factor=self.factor)

    def at(self, step: int) -> float:
        return float(self.factor ** (step // self.every))


@dataclass(frozen=True, repr=False)
class multi_step(Schedule):
    """Multiplied at given steps: `MultiStepLR`, and `piecewise_constant_schedule` of optax.

    Arguments:
        milestones: the first step of each new value, rising.
        factor: one for all, or one for each.

    Example:
        >>> [multi_step((10, 20), factor=0.5)(t) for t in (9, 10, 20)]
        [1.0, 0.5, 0.25]
    """

    milestones: tuple[int, ...]
    factor: float | tuple[float, ...] = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        whole(self, 0, **{f"milestones[{i}]": one for i, one in enumerate(self.milestones)})
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"multi_step: the milestones {self.milestones} must rise")
        if isinstance(self.factor, (tuple, list)):
            object.__setattr__(self, "factor", tuple(self.factor))
            finite(self, **{f"factor[{i}]": one for i, one in enumerate(self.factor)})
            if len(self.factor) != len(self.milestones):
                raise ValueError(f"multi_step: {len(self.factor)} factors for {len(self.milestones)} milestones: give "
                                 "one for each, or one for all")
        else:
            finite(self, factor=self.factor)

    @property
    def length(self) -> int | None:
        return self.milestones[-1] if self.milestones else 0

    def at(self, step: int) -> float:
        passed = sum(milestone <= step for milestone in self.milestones)
        if isinstance(self.factor, tuple):
            return float(math.prod(self.factor[:passed]))
        return float(self.factor**passed)


@dataclass(frozen=True, repr=False)
class points(Schedule):
    """Through given values at given steps, along lines, half cosines, or in jumps: `piecewise_interpolate_schedule`.

    Arguments:
        at_steps: the steps, rising, the first of them 0.
        values: at each of them.
        shape: "linear", "cosine", or "jump", which keeps each value until the next step.

    Example:
        >>> [points((0, 10, 30), (0.0, 1.0, 0.5))(t) for t in (5, 20, 40)]
        [0.5, 0.75, 0.5]
    """

    at_steps: tuple[int, ...]
    values: tuple[float, ...]
    shape: Literal["linear", "cosine", "jump"] = "linear"

    def __post_init__(self) -> None:
        object.__setattr__(self, "at_steps", tuple(self.at_steps))
        object.__setattr__(self, "values", tuple(self.values))
        whole(self, 0, **{f"at_steps[{i}]": one for i, one in enumerate(self.at_steps)})
        finite(self, **{f"values[{i}]": one for i, one in enumerate(self.values)})
        one_of(self, ("linear", "cosine", "jump"), shape=self.shape)
        if not self.at_steps or self.at_steps[0] or any(a >= b for a, b in pairwise(self.at_steps)):
            raise ValueError(f"points: the steps {self.at_steps} must rise from 0")
        if len(self.values) != len(self.at_steps):
            raise ValueError(f"points: {len(self.values)} values for {len(self.at_steps)} steps: give one for each")

    @property
    def length(self) -> int | None:
        return self.at_steps[-1]

    def at(self, step: int) -> float:
        place = sum(one <= step for one in self.at_steps) - 1
        if place == len(self.at_steps) - 1 or self.shape == "jump":
            return self.values[place]
        share = (step - self.at_steps[place]) / (self.at_steps[place + 1] - self.at_steps[place])
        return self.values[place] + (self.values[place + 1] - self.values[place]) * WAY[self.shape](share)
