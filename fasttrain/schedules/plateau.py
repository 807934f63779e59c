"""A share that falls when a metric no longer gets better."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from fasttrain.schedules.schedule import finite, one_of, whole


class PlateauDecision(NamedTuple):
    """What an `update` has come to.

    Attributes:
        reduced: the share fell.
        share: it is this now.
        patience_left: bad metrics until it falls.
    """

    reduced: bool
    share: float
    patience_left: int


class Plateau:
    """Multiplies by `factor` once a metric was no better for `patience` times in a row: `ReduceLROnPlateau`.

    Not a function of the step, so it has a state, which `Scheduler` saves with its own. It multiplies whatever schedule
    there is: ``Scheduler(optimizer, lr=warmup(100), plateau=Plateau())``. A metric that is NaN is no better.

    Arguments:
        mode: "min" if lower is better, else "max".
        factor: in (0, 1).
        patience: metrics that may be no better before it falls at the next.
        threshold: by how much a metric must be better, to be better.
        threshold_mode: "rel", as a share of the best, or "abs".
        cooldown: metrics after a fall that do not count.
        floor: the lowest share.

    Attributes:
        share: 1.0 at first.
        best: the best metric so far.

    Raises:
        ValueError: an argument is wrong.

    Example:
        >>> plateau = Plateau(factor=0.5, patience=1)
        >>> [plateau.update(metric).share for metric in (1.0, 0.9, 0.9, 0.9, 0.9)]
        [1.0, 1.0, 1.0, 0.5, 0.5]
    """

    def __init__(self, mode: Literal["min", "max"] = "min", factor: float = 0.1, patience: int = 10,
                 threshold: float = 1e-4, threshold_mode: Literal["rel", "abs"] = "rel", cooldown: int = 0,
                 floor: float = 0.0):
        one_of(self, ("min", "max"), mode=mode)
        one_of(self, ("rel", "abs"), threshold_mode=threshold_mode)
        whole(self, 0, patience=patience, cooldown=cooldown)
        finite(self, factor=factor, threshold=threshold, floor=floor)
        if not 0.0 < factor < 1.0:
            raise ValueError(f"Plateau: factor={factor!r} must be between 0 and 1")
        self.mode, self.factor, self.patience, self.cooldown, self.floor = mode, factor, patience, cooldown, floor
        self.threshold, self.threshold_mode = threshold, threshold_mode
        self.share, self.bad, self.cooling = 1.0, 0, 0
        self.best = math.inf if mode == "min" else -math.inf

    def update(self, metric: float) -> PlateauDecision:
        """Take a metric, as that of a validation.

        Arguments:
            metric: a number, or a tensor of one element, which is waited for.
        """
        metric = float(metric)
        if self._better(metric):
            self.best, self.bad = metric, 0
        else:
            self.bad += 1
        if self.cooling:
            self.cooling, self.bad = self.cooling - 1, 0
        before = self.share
        if self.bad > self.patience:
            self.share, self.bad, self.cooling = max(self.share * self.factor, self.floor), 0, self.cooldown
        return PlateauDecision(self.share < before, self.share, self.patience_left)

    @property
    def patience_left(self) -> int:
        """Metrics that may still be no better before the share falls."""
        return self.patience - self.bad

    def _better(self, metric: float) -> bool:
        if not math.isfinite(self.best):
            return metric < self.best if self.mode == "min" else metric > self.best
        way = -1.0 if self.mode == "min" else 1.0
        if self.threshold_mode == "rel":
            aim = self.best * (1.0 + way * self.threshold)
        else:
            aim = self.best + way * self.threshold
        return metric < aim if self.mode == "min" else metric > aim

    def state_dict(self) -> dict[str, Any]:
        """JSON values; a best metric that there is not yet is None."""
        return {"share": self.share, "bad": self.bad, "cooling": self.cooling, "mode": self.mode,
                "best": self.best if math.isfinite(self.best) else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: it is the state of something else, or of the other mode; nothing was changed.
        """
        if missing := [name for name in self.state_dict() if name not in state]:
            raise ValueError(f"the state has no {', '.join(missing)}: it is not one of a Plateau")
        if state["mode"] != self.mode:
            raise ValueError(f"the state is of a Plateau with mode={state['mode']!r}, this one has {self.mode!r}")
        self.share, self.bad, self.cooling = float(state["share"]), int(state["bad"]), int(state["cooling"])
        self.best = (math.inf if self.mode == "min" else -math.inf) if state["best"] is None else float(state["best"])
