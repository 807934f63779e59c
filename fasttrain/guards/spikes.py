"""Losses far above what they were: told, and answered by going back."""

from __future__ import annotations

import bisect
import math
from collections import deque
from typing import Any, Literal, NamedTuple

MAD = 1.4826  # of a normal distribution the standard deviation is so many median absolute deviations


class SpikeDecision(NamedTuple):
    """What a loss has come to.

    Attributes:
        spike: it is far above the others.
        score: by how many deviations; 0.0 while there are too few to compare with.
        middle: the median (or mean) that it was compared with; None while there is none.
        first: the first step of the spikes in a row; None where there is none.
        rollback: load the newest checkpoint from before step `first`, and leave out the batches in `skip`.
        skip: the batches of the spike, as they were given.
        stop: there were as many rollbacks as are allowed: something else is wrong.
    """

    spike: bool
    score: float
    middle: float | None
    first: int | None
    rollback: bool
    skip: tuple[Any, ...]
    stop: bool


class LossSpikes:
    """Compares each loss with those of the last steps that were no spikes.

    A spike is a loss that lies more than `threshold` deviations above the middle: the median, and the median absolute
    deviation (times 1.4826, which makes it a standard deviation where losses are normal), which single spikes do not
    move; or mean and standard deviation. A loss that is not finite is a spike. After `patience` of them in a row the
    decision is to go back and leave their batches out (Chowdhery et al., "PaLM", arXiv:2204.02311, section 5.1); the
    loop does that, and calls `rolled_back`.

    Arguments:
        window: how many losses it compares with.
        threshold: in deviations.
        method: "mad" or "z".
        warmup: losses before the first is judged.
        patience: spikes in a row that are answered by going back; None: they are only told.
        most: rollbacks; the decision after them is `stop`.
        least: no deviation is taken to be smaller than this share of the middle.

    Raises:
        ValueError: an argument is wrong.

    Example:
        >>> spikes = LossSpikes(window=32, warmup=8, patience=1)
        >>> for step in range(20):
        ...     decision = spikes.update(step, 2.0 + 0.1 * (step % 3), batch=step)
        >>> decision.spike
        False
        >>> spikes.update(20, 9.0, batch=20)
        SpikeDecision(spike=True, score=46.5..., middle=2.1, first=20, rollback=True, skip=(20,), stop=False)
    """

    def __init__(self, window: int = 128, threshold: float = 8.0, method: Literal["mad", "z"] = "mad", warmup: int = 32,
                 patience: int | None = None, most: int = 3, least: float = 1e-3):
        for name, value, lowest in (("window", window, 4), ("warmup", warmup, 4), ("most", most, 0),
                                    ("patience", 1 if patience is None else patience, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {lowest}")
        if warmup > window:
            raise ValueError(f"warmup={warmup} is longer than window={window}: it would never end")
        if not threshold > 0 or not least > 0:
            raise ValueError(f"threshold={threshold!r} and least={least!r} must be positive")
        if method not in ("mad", "z"):
            raise ValueError(f"method={method!r} is none of 'mad', 'z'")
        self.window, self.threshold, self.method, self.warmup = window, threshold, method, warmup
        self.patience, self.most, self.least = patience, most, least
        self.rollbacks = 0
        self._losses: deque[float] = deque(maxlen=window)
        self._sorted: list[float] = []
        self._row: list[list[Any]] = []  # step and batch of the spikes in a row

    def update(self, step: int, loss: float, batch: Any = None) -> SpikeDecision:
        """Take the loss of a step, a number of the host: that of the step before, as `Later` gives it."""
        middle, deviation = self._middle() if len(self._losses) >= self.warmup else (None, 0.0)
        finite = math.isfinite(loss)
        score = math.inf if not finite else 0.0 if middle is None else (loss - middle) / deviation
        if finite and score <= self.threshold:
            self._remember(loss)
            self._row = []
            return SpikeDecision(False, score, middle, None, False, (), False)
        self._row.append([step, batch])
        first = self._row[0][0]
        if self.patience is None or len(self._row) < self.patience:
            return SpikeDecision(True, score, middle, first, False, (), False)
        stop = self.rollbacks >= self.most
        return SpikeDecision(True, score, middle, first, not stop, tuple(one for _, one in self._row), stop)

    def rolled_back(self) -> None:
        """The loop went back: count it. Call it after the states of the checkpoint were loaded."""
        self.rollbacks += 1
        self._row = []

    def _remember(self, loss: float) -> None:
        if len(self._losses) == self.window:
            del self._sorted[bisect.bisect_left(self._sorted, self._losses[0])]
        self._losses.append(loss)
        bisect.insort(self._sorted, loss)

    def _middle(self) -> tuple[float, float]:
        """The middle of the losses, and their deviation from it."""
        values = self._sorted
        if self.method == "z":
            middle = math.fsum(values) / len(values)
            deviation = math.sqrt(math.fsum([(one - middle) ** 2 for one in values]) / len(values))
        else:
            middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
            deviation = MAD * _median_distance(values, middle)
        return middle, max(deviation, self.least * abs(middle), 1e-30)

    def state_dict(self) -> dict[str, Any]:
        """JSON values: the losses and counts."""
        return {"losses": list(self._losses), "row": list(self._row), "rollbacks": self.rollbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; rollbacks since then stay counted.

        Raises:
            ValueError: it is the state of something else; nothing was changed.
        """
        if missing := [name for name in ("losses", "row", "rollbacks") if name not in state]:
            raise ValueError(f"the state has no {', '.join(missing)}: it is not one of LossSpikes")
        self._losses = deque(state["losses"], maxlen=self.window)
        self._sorted, self._row = sorted(self._losses), list(state["row"])
        self.rollbacks = max(self.rollbacks, state["rollbacks"])


def _median_distance(values: list[float], middle: float) -> float:
    """The median of the distances of sorted values from their middle."""
    count = len(values)
    upper = _distance(values, middle, count // 2 + 1)
    return upper if count % 2 else (_distance(values, middle, count // 2) + upper) / 2


def _distance(values: list[float], middle: float, k: int) -> float:
    """The k-th smallest distance: the k nearest values stand side by side, and bisection finds the first of them."""
    low, high = 0, len(values) - k
    while low < high:
        first = (low + high) // 2
        if middle - values[first] > values[first + k] - middle:
            low = first + 1
        else:
            high = first
    return max(middle - values[low], values[low + k - 1] - middle)
