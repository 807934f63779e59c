"""What becomes of a step, and the error that ends a run of bad ones."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

MOST_NAMES = 20


class Judged(NamedTuple):
    """What has become of a step, told one step later.

    Attributes:
        step, batch: which, as they were given.
        loss, norm: on the host; None if they were not given.
        kind: "good"; "overflow": gradients overflowed a loss scale that backs off by itself; "bad".
        names: the parameters whose gradients were not finite, where they are known.
        in_a_row: bad steps up to this one.
        skipped: steps that were not made so far.
    """

    step: int
    batch: Any
    loss: float | None
    norm: float | None
    kind: Literal["good", "overflow", "bad"]
    names: tuple[str, ...]
    in_a_row: int
    skipped: int


class TooManyBadSteps(FloatingPointError):
    """As many steps in a row were bad as were allowed. Parameters and states are those after the last good step.

    Attributes:
        report: a list of JSON objects, one for each of the bad steps: step, batch, loss, norm, parameters.
        last_good: the last step that was good; None if there was none.
    """

    def __init__(self, report: list[dict[str, Any]], last_good: int | None):
        self.report, self.last_good = report, last_good
        last = report[-1]
        names = sorted({name for one in report for name in one["parameters"]})
        told = f"; gradients that are not finite: {', '.join(names[:MOST_NAMES])}" if names else ""
        whence = "since the start" if last_good is None else f"after step {last_good}"
        super().__init__(
            f"{len(report)} steps in a row had a loss or gradients that are not finite, {whence}: the last is step "
            f"{last['step']}, batch {last['batch']}, loss {last['loss']}{told}. No bad step was made: parameters and "
            "states are as after the last good one. Look at these batches, or use a lower learning rate, a longer "
            "warmup or clipping")
