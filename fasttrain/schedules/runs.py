"""Schedules of whole runs: what they have in front and behind belongs to their steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fasttrain.schedules.pieces import WAY, Shape, cosine, warmup
from fasttrain.schedules.schedule import Schedule, constant, finite, one_of, whole


@dataclass(frozen=True, repr=False)
class decay(Schedule):
    """A tail from 1 to `end`, "linear", "cosine", or "sqrt", which falls as 1 - sqrt(share).

    Haegele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", arXiv:2405.18392,
    section 3.1, which finds the square root best.

    Example:
        >>> decay(100, shape="sqrt")(25)
        0.5
    """

    steps: int
    end: float = 0.0
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        whole(self, 1, steps=self.steps)
        finite(self, end=self.end)
        one_of(self, WAY, shape=self.shape)

    def at(self, step: int) -> float:
        return self.end + (1 - self.end) * (1 - WAY[self.shape](min(step, self.steps) / self.steps))


def warmup_cosine(steps: int, warmup: int = 0, floor: float = 0.0, start: float | None = None) -> Schedule:
    r"""A rise in a line, then half a cosine: a run of `steps` in all.

    .. math::  s(t) = (t+1)/w \ \text{for } t < w, \qquad
               s(t) = \tfrac12 (1 + \cos \pi \tfrac{t - w}{n - w}) \ \text{for } w \le t < n

    Arguments:
        steps: n, of the run.
        warmup: w, the part of them in which it rises.
        floor: the value after the last step.
        start: as in `fasttrain.schedules.warmup`.

    Raises:
        ValueError: the run is shorter than its warmup.

    Example:
        >>> schedule = warmup_cosine(6, warmup=2)
        >>> schedule
        warmup(2) + cosine(4)
        >>> [round(schedule(t), 2) for t in range(6)]
        [0.5, 1.0, 1.0, 0.85, 0.5, 0.15]
    """
    return _run(steps, warmup, start, cosine(max(1, _left(steps, warmup)), floor))


def warmup_stable_decay(steps: int, warmup: int, decay_steps: int, floor: float = 0.0, shape: Shape = "sqrt",
                        start: float | None = None) -> Schedule:
    """A rise, a plateau, and a tail: a run of `steps` in all.

    Hu et al., "MiniCPM", arXiv:2404.06395, section 4.2; the tail "sqrt" is that of `decay`.

    Arguments:
        steps: of the run.
        warmup: the part of them in which it rises.
        decay_steps: the part in which it falls.
        floor, shape: of the tail.
        start: as in `fasttrain.schedules.warmup`.

    Raises:
        ValueError: warmup and decay together are longer than the run.

    Example:
        >>> warmup_stable_decay(1000, warmup=100, decay_steps=200)
        warmup(100) + constant(steps=700) + decay(200, shape='sqrt')
    """
    whole(decay, 1, decay_steps=decay_steps)
    between = _left(steps, warmup) - decay_steps
    if between < 0:
        raise ValueError(f"a run of {steps} steps is shorter than its warmup of {warmup} and its decay of "
                         f"{decay_steps} steps: make the run longer, or one of these shorter")
    tail = decay(decay_steps, floor, shape)
    return _run(steps, warmup, start, constant(steps=between) + tail if between else tail)


def _left(steps: int, rise: int) -> int:
    whole(warmup, 1, steps=steps)
    whole(warmup, 0, warmup=rise)
    if rise > steps:
        raise ValueError(f"a run of {steps} steps is shorter than its warmup of {rise} steps: use a warmup of at most "
                         f"{steps}, or a longer run")
    return steps - rise


def _run(steps: int, rise: int, start: float | None, rest: Schedule) -> Schedule:
    if rise == 0:
        return rest
    return warmup(rise, start) if rise == steps else warmup(rise, start) + rest


@dataclass(frozen=True, repr=False)
class one_cycle(Schedule):
    """Up, down again, and far below: `OneCycleLR`.

    L. Smith and N. Topin, "Super-Convergence", arXiv:1708.07120. Of the momentum that goes with it:
    ``one_cycle(steps, start=0.95, peak=0.85, end=0.95)``.

    Arguments:
        steps: of the run.
        rise: the share of them in which it goes up.
        start, peak, end: values at the first step, at the turn, and at the last step.
        shape: "cosine" or "linear".
        three_phases: first down to `start`, in as many steps as it went up, then to `end`.

    Raises:
        ValueError: a phase has no steps.

    Example:
        >>> schedule = one_cycle(10, rise=0.5)
        >>> [round(schedule(t), 4) for t in (0, 4, 9)]
        [0.04, 1.0, 0.0]
    """

    steps: int
    rise: float = 0.3
    start: float = 1 / 25
    end: float = 1 / 25 / 1e4
    peak: float = 1.0
    shape: Literal["cosine", "linear"] = "cosine"
    three_phases: bool = False

    def __post_init__(self) -> None:
        whole(self, 2, steps=self.steps)
        finite(self, rise=self.rise, start=self.start, end=self.end, peak=self.peak)
        one_of(self, ("cosine", "linear"), shape=self.shape)
        ends = [0.0, *(end for end, _, _ in self._phases())]
        if sorted(set(ends)) != ends:
            raise ValueError(f"one_cycle: rise={self.rise} of {self.steps} steps leaves a phase without steps: the "
                             f"phases would end at {ends[1:]}")

    def _phases(self) -> list[tuple[float, float, float]]:
        """Of each phase its end, and the values that it goes from and to."""
        top, last = self.rise * self.steps - 1, self.steps - 1.0
        if self.three_phases:
            return [(top, self.start, self.peak), (2 * self.rise * self.steps - 2, self.peak, self.start),
                    (last, self.start, self.end)]
        return [(top, self.start, self.peak), (last, self.peak, self.end)]

    def at(self, step: int) -> float:
        step = min(step, self.steps - 1)
        begin, phases = 0.0, self._phases()
        while step > phases[0][0]:
            begin = phases.pop(0)[0]
        end, before, after = phases[0]
        share = (step - begin) / (end - begin)
        if self.shape == "linear":
            return (after - before) * share + before
        return after + (before - after) / 2 * (math.cos(math.pi * share) + 1)


@dataclass(frozen=True, repr=False)
class cyclic(Schedule):
    """Up and down without end: `CyclicLR`.

    L. Smith, "Cyclical Learning Rates", arXiv:1506.01186. Of the momentum that goes with it, swap `low` and `high`.

    Arguments:
        up: steps of each rise.
        down: steps of each fall; None: as many.
        low, high: the values between which it moves.
        shape: "triangular"; "triangular2", half as high in every cycle; "exp_range", gamma^t as high.
        gamma: of "exp_range".

    Example:
        >>> [cyclic(2, low=0.0)(t) for t in range(6)]
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.5]
    """

    up: int
    down: int | None = None
    low: float = 0.1
    high: float = 1.0
    shape: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    gamma: float = 1.0

    def __post_init__(self) -> None:
        whole(self, 1, up=self.up, down=self.up if self.down is None else self.down)
        finite(self, low=self.low, high=self.high, gamma=self.gamma)
        one_of(self, ("triangular", "triangular2", "exp_range"), shape=self.shape)

    def at(self, step: int) -> float:
        down = self.up if self.down is None else self.down
        cycle, place = divmod(step, self.up + down)
        height = place / self.up if place <= self.up else (self.up + down - place) / down
        if self.shape == "triangular2":
            height *= 0.5**cycle
        elif self.shape == "exp_range":
            height *= self.gamma**step
        return self.low + (self.high - self.low) * height
