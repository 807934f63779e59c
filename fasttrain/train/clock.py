"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseClock:
    """Adds up the seconds spent in named phases.

    On a CPU it reads the clock. On a GPU, where calls return before the work is done, it records events on the
    current stream and reads them in `take`, so that timing a phase never waits for it. Where torch's profiler runs, it
    sees the phases by their names.

    Example:
        >>> clock = PhaseClock(torch.device("cpu"))
        >>> with clock("data"):
        ...     _ = sum(range(1000))
        >>> list(clock.take())
        ['data']
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if torch.autograd.profiler._is_profiler_enabled:
            with torch.profiler.record_function(phase), self._measure(phase):
                yield
        else:
            with self._measure(phase):
                yield

    @contextmanager
    def _measure(self, phase: str) -> Iterator[None]:
        if self.on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self.events.append((phase, begin, end))
        else:
            begun = time.perf_counter()
            yield
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begun

    def move(self, source: str, target: str, seconds: float) -> None:
        """Count seconds of one phase, measured otherwise, to another. Not on a GPU: the host's are not its."""
        if not self.on_gpu:
            self.seconds[source] -= seconds
            self.seconds[target] = self.seconds.get(target, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call. On a GPU this waits for the work recorded so far."""
        if self.events:
            torch.cuda.synchronize()
        for phase, begin, end in self.events:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + begin.elapsed_time(end) / 1000
        taken, self.seconds, self.events = self.seconds, {}, []
        return taken
