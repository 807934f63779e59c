"""What validation tells: the best so far, when to stop, and how far training has run ahead."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

MODES = ("min", "max")


class BestDecision(NamedTuple):
    """Attributes:
        better: this metric is the best.
        best, step: the best, and its step; None before there is one.
    """

    better: bool
    best: float | None
    step: int | None


class Best:
    """The best metric so far.

    Arguments:
        mode: "min" if lower is better, else "max".
        min_delta: by how much a metric must be better, to be better.

    Example:
        >>> best = Best()
        >>> [best.update(metric, step).better for step, metric in enumerate((2.0, 1.5, float("nan"), 1.6))]
        [True, True, False, False]
        >>> best.best, best.step
        (1.5, 1)
    """

    def __init__(self, mode: Literal["min", "max"] = "min", min_delta: float = 0.0):
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is none of {', '.join(map(repr, MODES))}")
        if not 0.0 <= min_delta < math.inf:
            raise ValueError(f"min_delta={min_delta!r} must be a finite number, and not negative")
        self.mode, self.min_delta = mode, min_delta
        self.best: float | None = None
        self.step: int | None = None

    def update(self, metric: float, step: int) -> BestDecision:
        """Take a metric; one that is not finite is no better."""
        metric = float(metric)
        better = math.isfinite(metric) and (
            self.best is None or (self.best - metric if self.mode == "min" else metric - self.best) > self.min_delta)
        if better:
            self.best, self.step = metric, step
        return BestDecision(better, self.best, self.step)

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"mode": self.mode, "best": self.best, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: it is the state of something else, or of the other mode; nothing was changed.
        """
        if missing := [name for name in ("mode", "best", "step") if name not in state]:
            raise ValueError(f"the state has no {', '.join(missing)}: it is not one of Best")
        if state["mode"] != self.mode:
            raise ValueError(f"the state was saved with mode={state['mode']!r}, and this one has {self.mode!r}")
        self.best, self.step = state["best"], state["step"]


class StopDecision(NamedTuple):
    """Attributes:
        stop: end the run.
        better: this metric is the best.
        patience_left: metrics that may still be no better.
        best, step: the best, and its step.
        reason: why it stops, in words; None while it goes on.
    """

    stop: bool
    better: bool
    patience_left: int
    best: float | None
    step: int | None
    reason: str | None


class EarlyStopping:
    """Ends a run whose metric gets no better.

    Arguments:
        patience: metrics in a row that may be no better; the one after them ends the run.
        min_delta: by how much a metric must be better, to be better.
        mode: "min" if lower is better, else "max".
        goal: a metric that is good enough to end with.
        nonfinite: what a metric that is not finite does: "count" as no better, or "stop" at once.

    Raises:
        ValueError: an argument is wrong.

    Example:
        >>> stopping = EarlyStopping(patience=1)
        >>> for step, loss in enumerate((2.0, 1.5, 1.6, 1.7)):
        ...     decision = stopping.update(loss, step)
        >>> decision.stop, decision.best, decision.step, decision.reason
        (True, 1.5, 1, 'no better than 1.5 of step 1 for 2 evaluations')
    """

    def __init__(self, patience: int, min_delta: float = 0.0, mode: Literal["min", "max"] = "min",
                 goal: float | None = None, nonfinite: Literal["count", "stop"] = "count"):
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 0:
            raise ValueError(f"patience={patience!r} must be a whole number, and not negative")
        if nonfinite not in ("count", "stop"):
            raise ValueError(f"nonfinite={nonfinite!r} is none of 'count', 'stop'")
        self.best = Best(mode, min_delta)
        self.patience, self.goal, self.nonfinite = patience, goal, nonfinite
        self.worse = 0

    @property
    def patience_left(self) -> int:
        """Metrics that may still be no better before the one that ends the run."""
        return max(0, self.patience - self.worse)

    def update(self, metric: float, step: int) -> StopDecision:
        """Take the metric of an evaluation after `step` steps."""
        metric = float(metric)
        better, best, when = self.best.update(metric, step)
        self.worse = 0 if better else self.worse + 1
        reason = None
        if not math.isfinite(metric) and self.nonfinite == "stop":
            reason = f"the metric of step {step} is {metric}"
        elif better and self.goal is not None and (metric <= self.goal if self.best.mode == "min"
                                                   else metric >= self.goal):
            reason = f"{metric} of step {step} reaches the goal of {self.goal}"
        elif self.worse > self.patience:
            than = f"no better than {best} of step {when}" if when is not None else "no finite metric"
            reason = f"{than} for {self.worse} evaluations"
        return StopDecision(reason is not None, better, self.patience_left, best, when, reason)

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"worse": self.worse, "best": self.best.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: it is the state of something else, or of the other mode; nothing was changed.
        """
        if missing := [name for name in ("worse", "best") if name not in state]:
            raise ValueError(f"the state has no {', '.join(missing)}: it is not one of EarlyStopping")
        self.best.load_state_dict(state["best"])
        self.worse = state["worse"]


class GapDecision(NamedTuple):
    """Attributes:
        gap: the validation's loss minus the training's.
        growing: evaluations in a row in which it grew although training got better.
        overfitting: these were as many as `patience`.
    """

    gap: float
    growing: int
    overfitting: bool


class Gap:
    """How far the loss of training has run ahead of that of validation.

    Arguments:
        patience: evaluations in a row in which training got better and validation worse that are called overfitting.

    Example:
        >>> gap = Gap(patience=2)
        >>> for train, validation in ((2.0, 2.25), (1.5, 1.75), (1.25, 1.875), (1.0, 2.0)):
        ...     decision = gap.update(train, validation)
        >>> decision.gap, decision.growing, decision.overfitting
        (1.0, 2, True)
    """

    def __init__(self, patience: int = 3):
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience={patience!r} must be a whole number of at least 1")
        self.patience, self.growing = patience, 0
        self._before: list[float] | None = None

    def update(self, train: float, validation: float) -> GapDecision:
        """Take both losses of an evaluation. Some that are not finite are told and not remembered."""
        gap = validation - train
        if math.isfinite(gap):
            if self._before is not None:
                apart = train < self._before[0] and validation > self._before[1]
                self.growing = self.growing + 1 if apart else 0
            self._before = [train, validation]
        return GapDecision(gap, self.growing, self.growing >= self.patience)

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"growing": self.growing, "before": self._before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: it is the state of something else; nothing was changed.
        """
        if missing := [name for name in ("growing", "before") if name not in state]:
            raise ValueError(f"the state has no {', '.join(missing)}: it is not one of Gap")
        self.growing, self._before = state["growing"], state["before"]
