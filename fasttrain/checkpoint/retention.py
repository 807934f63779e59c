"""Which checkpoints are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fasttrain.checkpoint.find import Found


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay; one that any of these rules names stays, and the newest complete one always does.

    Arguments:
        last: the newest ones; None: all.
        best: those with the best metric, ...
        metric: which of the metrics that they were published with, ...
        mode: ``"min"`` or ``"max"``. One without that metric, or with NaN, is none of the best.
        every: those whose step is a multiple of it, for ever; 0: none.
        every_s: for ever one in so many seconds, by the times in the manifests; 0: none.
        ages_s: of each age in seconds, the newest that is at least so old (before the newest of all), and the one that
            will take its place: there is then always one from before a fault that shows late.

    Raises:
        ValueError: a number makes no sense, or `best` is asked for without a `metric`.

    Example:
        >>> from pathlib import Path
        >>> from fasttrain.checkpoint import Found, Keep
        >>> found = [Found(Path(str(step)), step=step, sequence=step, metrics={"loss": abs(step - 3)})
        ...          for step in range(1, 8)]
        >>> Keep(last=2, best=1, metric="loss", every=5).chosen(found)
        {PosixPath('7'): 'last 2', PosixPath('6'): 'last 2', PosixPath('3'): 'best loss',
         PosixPath('5'): 'every 5 steps'}
    """

    last: int | None = 3
    best: int = 0
    metric: str | None = None
    mode: str = "min"
    every: int = 0
    every_s: float = 0.0
    ages_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise ValueError(f"last must be at least 1 (None keeps all), not {self.last}")
        if min(self.best, self.every, self.every_s, *self.ages_s, 0) < 0:
            raise ValueError("best, every, every_s and ages_s must not be negative")
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', not {self.mode!r}")
        if self.best and not self.metric:
            raise ValueError(f"best={self.best} needs the metric to compare: metric='validation'")

    def chosen(self, found: Sequence[Found]) -> dict[Path, str]:
        """Those that stay, each with the first rule that names it.

        Arguments:
            found: complete ones. Of several with the same step only the newest counts.
        """
        newest_first = sorted(found, key=lambda one: one.sequence, reverse=True)
        steps = {one.step: one for one in reversed(newest_first)}
        newest_first = [one for one in newest_first if steps[one.step] is one]
        reasons = [(one, f"last {self.last}" if self.last else "all are kept") for one in newest_first[: self.last]]
        if self.best:
            sign = 1 if self.mode == "min" else -1
            scored = [(sign * one.metrics[self.metric], -one.sequence, one) for one in newest_first  # type: ignore[index]
                      if not math.isnan(one.metrics.get(self.metric, math.nan))]  # type: ignore[arg-type]
            scored.sort(key=lambda entry: entry[:2])
            reasons += [(one, f"best {self.metric}") for *_, one in scored[: self.best]]
        if self.every:
            reasons += [(one, f"every {self.every} steps") for one in newest_first if one.step % self.every == 0]
        if newest_first and (self.every_s or self.ages_s):
            reasons += self._by_time(newest_first)
        kept: dict[Path, str] = {}
        for one, reason in reasons:
            kept.setdefault(one.path, reason)
        return kept

    def _by_time(self, newest_first: list[Found]) -> list[tuple[Found, str]]:
        reasons = []
        times = [(datetime.fromisoformat(one.time).timestamp(), one) for one in newest_first if one.time]
        before = -math.inf
        for time, one in reversed(times):
            if self.every_s and abs(time - before) >= self.every_s:  # abs: the clock may have been set back
                reasons.append((one, f"every {self.every_s:g} s"))
                before = time
        for age in self.ages_s:
            limit = times[0][0] - age if times else 0
            old = [one for time, one in times if time <= limit][:1]
            young = [one for time, one in times if time > limit][-1:]
            reasons += [(one, f"age {age:g} s") for one in old + young]
        return reasons
