"""What a schedule is: a pure function of the step, that tells its length and can be joined and multiplied.

A schedule has no state. Two of the same text are equal, and its text (`repr`) is read back by
`fasttrain.schedules.parse`; so it can be compared, pickled, and written into a checkpoint.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable
from typing import Any


def whole(owner: Any, least: int, **values: Any) -> None:
    """Refuse values that are no whole numbers of at least `least`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{type(owner).__name__}: {name}={value!r} must be a whole number of at least {least}")


def finite(owner: Any, **values: Any) -> None:
    """Refuse values that are no finite numbers."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{type(owner).__name__}: {name}={value!r} must be a finite number")


def one_of(owner: Any, known: Any, **values: Any) -> None:
    """Refuse values that are not among those known."""
    for name, value in values.items():
        if value not in known:
            raise ValueError(f"{type(owner).__name__}: {name}={value!r} is none of {', '.join(map(repr, known))}")


class Schedule:
    """A pure function from a step, counted from 0, to a number: mostly the share of a highest value.

    `a + b` is a for its length, then b from its own step 0. `a * b` and `0.5 * a` multiply. Past its length a schedule
    keeps the value that it has there. Yours is a subclass with `at`, best a frozen dataclass; or any function of the
    step in `function`.

    Example:
        >>> from fasttrain.schedules import cosine, warmup
        >>> schedule = warmup(4) + cosine(100, floor=0.1)
        >>> [round(schedule(step), 3) for step in (0, 3, 4, 54, 104, 1000)]
        [0.25, 1.0, 1.0, 0.55, 0.1, 0.1]
        >>> schedule.length, schedule.warmup_steps
        (104, 4)
        >>> 2 * schedule
        2 * (warmup(4) + cosine(100, floor=0.1))
    """

    @property
    def length(self) -> int | None:
        """Steps after which it stands still; None: never."""
        return getattr(self, "steps", None)

    @property
    def warmup_steps(self) -> int:
        """Steps of the warmup that it begins with."""
        return 0

    def at(self, step: int) -> float:
        """The value at a step that is not negative."""
        raise NotImplementedError(f"{type(self).__name__} has no method at(step)")

    def __call__(self, step: int) -> float:
        if step < 0:
            raise ValueError(f"a schedule has no value at step {step}: steps are counted from 0")
        return self.at(step)

    def check(self, steps: int) -> None:
        """Refuse to be the schedule of a run that would end in the warmup.

        Raises:
            ValueError: the run has fewer steps than the warmup.
        """
        if steps < self.warmup_steps:
            raise ValueError(f"a run of {steps} steps ends in the warmup of {self.warmup_steps} steps of {self!r}: "
                             f"use a warmup of at most {steps} steps, or a longer run")

    def __add__(self, other: Any) -> Schedule:
        if not isinstance(other, Schedule):
            return NotImplemented
        return joined(tuple(piece for one in (self, other) for piece in
                            (one.pieces if isinstance(one, joined) else (one,))))

    def __mul__(self, other: Any) -> Schedule:
        if isinstance(other, (int, float, Schedule)):
            return times(self, other)
        return NotImplemented

    def __rmul__(self, other: Any) -> Schedule:
        return times(other, self) if isinstance(other, (int, float)) else NotImplemented

    def __repr__(self) -> str:
        told = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING:
                told.append(repr(value))
            elif field.init and value != field.default:
                told.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(told)})"


@dataclasses.dataclass(frozen=True, repr=False)
class joined(Schedule):
    """One schedule after the other: what `+` makes. Each begins at its own step 0 where the one before ends.

    Raises:
        ValueError: one that is not the last has no end.
    """

    pieces: tuple[Schedule, ...]
    _starts: tuple[int, ...] = dataclasses.field(default=(), init=False, compare=False)

    def __post_init__(self) -> None:
        if not self.pieces:
            raise ValueError("joined: there are no schedules to join")
        starts = [0]
        for piece in self.pieces[:-1]:
            if piece.length is None:
                raise ValueError(f"{piece!r} has no end, so that nothing can follow it: give it one, "
                                 f"as in first(1000, {piece!r})")
            starts.append(starts[-1] + piece.length)
        object.__setattr__(self, "_starts", tuple(starts))

    @property
    def length(self) -> int | None:
        last = self.pieces[-1].length
        return None if last is None else self._starts[-1] + last

    @property
    def warmup_steps(self) -> int:
        return self.pieces[0].warmup_steps

    def at(self, step: int) -> float:
        place = bisect.bisect_right(self._starts, step) - 1
        return self.pieces[place].at(step - self._starts[place])

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.pieces))


@dataclasses.dataclass(frozen=True, repr=False)
class times(Schedule):
    """The product of two schedules, or of a number and one: what `*` makes."""

    left: Schedule | float
    right: Schedule | float

    def __post_init__(self) -> None:
        for name, value in (("left", self.left), ("right", self.right)):
            if not isinstance(value, Schedule):
                finite(self, **{name: value})

    def _schedules(self) -> list[Schedule]:
        return [one for one in (self.left, self.right) if isinstance(one, Schedule)]

    @property
    def length(self) -> int | None:
        lengths = [one.length for one in self._schedules()]
        return None if None in lengths else max(one for one in lengths if one is not None)

    @property
    def warmup_steps(self) -> int:
        return max(one.warmup_steps for one in self._schedules())

    def at(self, step: int) -> float:
        left, right = self.left, self.right
        return ((left.at(step) if isinstance(left, Schedule) else left)
                * (right.at(step) if isinstance(right, Schedule) else right))

    def __repr__(self) -> str:
        left = f"({self.left!r})" if isinstance(self.left, joined) else repr(self.left)
        right = f"({self.right!r})" if isinstance(self.right, (joined, times)) else repr(self.right)
        return f"{left} * {right}"


@dataclasses.dataclass(frozen=True, repr=False)
class first(Schedule):
    """The first steps of another schedule, so that something can follow one that has no end.

    Example:
        >>> from fasttrain.schedules import inverse_sqrt, linear
        >>> schedule = first(300, inverse_sqrt(100)) + 0.5 * linear(100)
        >>> schedule(299), schedule(300), schedule(400)
        (0.5006261743217588, 0.5, 0.0)
    """

    steps: int
    schedule: Schedule

    def __post_init__(self) -> None:
        whole(self, 1, steps=self.steps)
        self.schedule.check(self.steps)

    @property
    def warmup_steps(self) -> int:
        return self.schedule.warmup_steps

    def at(self, step: int) -> float:
        return self.schedule.at(min(step, self.steps))


@dataclasses.dataclass(frozen=True, repr=False)
class rounded(Schedule):
    """A schedule of whole numbers, as that of a batch size: the nearest multiple of `multiple`, one at least.

    Example:
        >>> from fasttrain.schedules import linear
        >>> batch = rounded(linear(1000, start=64, end=256), 64)
        >>> [batch(step) for step in (0, 250, 500, 1000)]
        [64, 128, 192, 256]
    """

    schedule: Schedule
    multiple: int = 1

    def __post_init__(self) -> None:
        whole(self, 1, multiple=self.multiple)

    @property
    def length(self) -> int | None:
        return self.schedule.length

    @property
    def warmup_steps(self) -> int:
        return self.schedule.warmup_steps

    def at(self, step: int) -> int:
        return max(1, math.floor(self.schedule.at(step) / self.multiple + 0.5)) * self.multiple


@dataclasses.dataclass(frozen=True, repr=False)
class constant(Schedule):
    """One value, for ever or for some steps.

    Example:
        >>> constant(0.5)(1000)
        0.5
    """

    value: float = 1.0
    steps: int | None = None

    def __post_init__(self) -> None:
        finite(self, value=self.value)
        if self.steps is not None:
            whole(self, 0, steps=self.steps)

    def at(self, step: int) -> float:
        return self.value


@dataclasses.dataclass(frozen=True, repr=False)
class function(Schedule):
    """Any function of the step as a schedule. It must depend on nothing else.

    Arguments:
        call: from a step to a number.
        steps: its length; None: it has no end.

    Example:
        >>> (0.5 * function(lambda step: 1 / (1 + step)))(3)
        0.125
    """

    call: Callable[[int], float]
    steps: int | None = None

    def at(self, step: int) -> float:
        return self.call(step if self.steps is None else min(step, self.steps))

    def __repr__(self) -> str:
        name = getattr(self.call, "__qualname__", type(self.call).__qualname__)
        return f"function({getattr(self.call, '__module__', '')}.{name})"


def as_schedule(given: Any) -> Schedule:
    """A schedule, a function of the step, or a number, as a schedule.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(given, Schedule):
        return given
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return constant(given)
    if callable(given):
        return function(given)
    raise TypeError(f"{given!r} is no schedule: give one of fasttrain.schedules, a function of the step, or a number")

