"""The pieces that schedules are made of: each a pure function of the steps since its beginning.

Values are those of torch's, transformers' and optax's schedules of the same kind, in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fasttrain.schedules.schedule import Schedule, finite, one_of, whole

Shape = Literal["linear", "cosine", "sqrt"]
WAY: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "sqrt": math.sqrt,
}
"""How much of a way is done after a share x of its steps."""


@dataclass(frozen=True, repr=False)
class warmup(Schedule):
    """Rises to 1: put it in front of any schedule, `warmup(100) + cosine(1000)`; or on top of one, `warmup(100) * ...`.

    Arguments:
        steps: of the rise.
        start: the value of step 0, as in torch's, transformers' and optax's warmups, which reach 1 after the last step
            of the rise. Without it the first step is one of those that rise: step t has (t + 1) / steps, and none is
            wasted on 0.
        shape: "linear", "cosine", or "sqrt", the square-root tail of `decay` backwards.

    Example:
        >>> [warmup(4)(t) for t in range(5)], [warmup(4, start=0.0)(t) for t in range(5)]
        ([0.25, 0.5, 0.75, 1.0, 1.0], [0.0, 0.25, 0.5, 0.75, 1.0])
    """

    steps: int
    start: float | None = None
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        whole(self, 0, steps=self.steps)
        one_of(self, WAY, shape=self.shape)
        if self.start is not None:
            finite(self, start=self.start)

    @property
    def warmup_steps(self) -> int:
        return self.steps

    def at(self, step: int) -> float:
        if self.start is None:
            share, start = ((step + 1) / self.steps if step < self.steps else 1.0), 0.0
        else:
            share, start = (step / self.steps if step < self.steps else 1.0), self.start
        if self.shape != "linear":
            share = 1 - WAY[self.shape](1 - share)
        return start + (1 - start) * share


@dataclass(frozen=True, repr=False)
class linear(Schedule):
    """A line from one value to another: `LinearLR` of torch, `linear_schedule` of optax.

    Example:
        >>> linear(4)(1), linear(4, start=0.5, end=1.0)(2)
        (0.75, 0.75)
    """

    steps: int
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        whole(self, 1, steps=self.steps)
        finite(self, start=self.start, end=self.end)

    def at(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(step, self.steps) / self.steps


@dataclass(frozen=True, repr=False)
class cosine(Schedule):
    """Half a cosine from 1 to `floor`: `CosineAnnealingLR`; with `cycles`, so many of them, with hard restarts.

    Loshchilov and Hutter, "SGDR", arXiv:1608.03983, equation 5.

    Example:
        >>> round(cosine(4, floor=0.1)(2), 9), cosine(8, cycles=2)(4)
        (0.55, 1.0)
    """

    steps: int
    floor: float = 0.0
    cycles: int = 1

    def __post_init__(self) -> None:
        whole(self, 1, steps=self.steps, cycles=self.cycles)
        finite(self, floor=self.floor)

    def at(self, step: int) -> float:
        if step >= self.steps:
            return self.floor
        if self.cycles == 1:
            wave = math.cos(math.pi * step / self.steps)
        else:
            wave = math.cos(math.pi * (self.cycles * step / self.steps % 1.0))
        return self.floor + (1 - self.floor) * ((1 + wave) / 2)


@dataclass(frozen=True, repr=False)
class restarts(Schedule):
    """Half cosines without end, each `growth` times as long as the one before: `CosineAnnealingWarmRestarts`.

    Arguments:
        period: steps of the first.
        growth: a whole number.
        floor: the value that each falls to.
        shrink: what the height of each is multiplied with, after the first.

    Example:
        >>> [restarts(2, growth=2)(t) for t in (0, 2, 6)]
        [1.0, 1.0, 1.0]
    """

    period: int
    growth: int = 1
    floor: float = 0.0
    shrink: float = 1.0

    def __post_init__(self) -> None:
        whole(self, 1, period=self.period, growth=self.growth)
        finite(self, floor=self.floor, shrink=self.shrink)

    def at(self, step: int) -> float:
        if self.growth == 1:
            cycle, step, period = step // self.period, step % self.period, self.period
        else:
            cycle, period = 0, self.period
            while step >= period:
                cycle, step, period = cycle + 1, step - period, period * self.growth
        height = (1 - self.floor) * self.shrink**cycle
        return self.floor + height * ((1 + math.cos(math.pi * step / period)) / 2)


@dataclass(frozen=True, repr=False)
class polynomial(Schedule):
    """Falls from 1 to `end` as the power of the steps that are left: `PolynomialLR`.

    Example:
        >>> polynomial(4, power=2.0)(2)
        0.25
    """

    steps: int
    power: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        whole(self, 1, steps=self.steps)
        finite(self, power=self.power, end=self.end)
        if not self.power > 0:
            raise ValueError(f"polynomial: power={self.power!r} must be positive")

    def at(self, step: int) -> float:
        return self.end + (1 - self.end) * (1 - min(step, self.steps) / self.steps) ** self.power


@dataclass(frozen=True, repr=False)
class inverse_sqrt(Schedule):
    """1 / sqrt(1 + t / timescale), without end: after a warmup of `timescale` steps the Transformer's own schedule.

    Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, section 5.3; `get_inverse_sqrt_schedule` of
    transformers.

    Example:
        >>> inverse_sqrt(100)(300)
        0.5
    """

    timescale: int

    def __post_init__(self) -> None:
        whole(self, 1, timescale=self.timescale)

    def at(self, step: int) -> float:
        return 1.0 / math.sqrt((step + self.timescale) / self.timescale)
