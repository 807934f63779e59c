"""The numbers of a line of the log: means over the steps since the last one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fasttrain.train.clock import PhaseClock
from fasttrain.train.stepper import Numbers
from fasttrain.train.usage import Memory

Record = dict[str, Any]


class Meter:
    """Adds up losses, steps and time; `read` makes them the numbers of a line and begins anew.

    Arguments:
        clock: whose phases are shown as shares of the time in steps.
        tokens: of a step, on all ranks together.
        flops: operations of a step on this rank, forward and backward; 0: not known.
        peak: operations per second that its device can do at most; None: not known.

    Attributes:
        loss_sum, losses: of the steps since the last line.
        last_loss: the mean in the last line.
        seconds: of all lines, also of the parts of a run before it was resumed.

    Example:
        >>> import torch
        >>> meter = Meter(PhaseClock(torch.device("cpu")), tokens=1000)
        >>> meter.add(Numbers(1, loss=3.0, norm=0.5, skipped=False, stop=0))
        >>> meter.add(Numbers(2, loss=2.0, norm=0.25, skipped=False, stop=0))
        >>> record = meter.read()
        >>> record["loss"], record["grad_norm"]
        (2.5, 0.25)
    """

    def __init__(self, clock: PhaseClock, tokens: int, flops: float = 0.0, peak: float | None = None):
        self.clock, self.tokens, self.flops, self.peak = clock, tokens, flops, peak
        self.memory = Memory(clock.device)
        self.loss_sum, self.losses, self.steps, self.work = 0.0, 0, 0, 0.0
        self.norm = self.last_loss = float("nan")
        self.seconds = 0.0
        self.begun = time.perf_counter()

    def add(self, numbers: Numbers, size: float = 1.0) -> None:
        """A step has come to these numbers; it was so many times the size of the first."""
        self.steps, self.work = self.steps + 1, self.work + size
        self.norm = numbers.norm
        if not numbers.skipped:
            self.loss_sum, self.losses = self.loss_sum + numbers.loss, self.losses + 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within is no training: tokens per second do not count it."""
        before = time.perf_counter()
        yield
        self.begun += time.perf_counter() - before

    def read(self) -> Record:
        """``loss`` (NaN if all steps were skipped), ``grad_norm`` of the last, ``tokens_per_s``, ``memory_gb``,
        ``peak_gb``, ``mfu`` where the peak is known, and ``share`` of each phase."""
        phases, now = self.clock.take(), time.perf_counter()
        self.seconds += now - self.begun
        each = (now - self.begun) / (self.work or 1)
        self.last_loss = self.loss_sum / self.losses if self.losses else float("nan")
        record: Record = {"loss": self.last_loss, "grad_norm": self.norm, "tokens_per_s": self.tokens / each,
                          "seconds": self.seconds, **self.memory.now()}
        if self.peak and self.flops:
            record["mfu"] = self.flops / each / self.peak
        total = sum(phases.values())
        record["share"] = {phase: seconds / total for phase, seconds in phases.items()}
        self.loss_sum, self.losses, self.steps, self.work, self.begun = 0.0, 0, 0, 0.0, now
        return record

    def total_s(self) -> float:
        """Seconds up to now, as `seconds` counts them."""
        return self.seconds + time.perf_counter() - self.begun

    def state_dict(self) -> Record:
        """JSON values, the same on every rank: what the next line adds up."""
        return {"loss_sum": self.loss_sum, "losses": self.losses, "last_loss": self.last_loss}

    def load_state_dict(self, state: Record) -> None:
        """Take over what `state_dict` returned; speed and shares begin anew."""
        self.loss_sum, self.losses, self.last_loss = state["loss_sum"], state["losses"], state["last_loss"]
        self.steps, self.work, self.begun = 0, 0.0, time.perf_counter()
        self.clock.take()
