"""How far work on text is: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

EVERY = 10.0  # seconds between two lines


class Progress:
    """Shows how many of `total` bytes are done. A context manager.

    Args:
        total: bytes of text.
        done: of them before now, by a run that was stopped.
    """

    def __init__(self, total: int, done: int = 0):
        self.total, self.done, self.before = total, done, done
        self.begun = self.said = time.monotonic()
        self.bar: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
                           expand=True)
            self.task = self.bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        elif self.done:
            print(f"going on: {self.done:,} of {self.total:,} bytes were done", flush=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def show(self, more: int, said: str) -> None:
        """So many bytes more are done; a line to print, or ""."""
        self.done += more
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=self.done)
            if said:
                self.bar.console.print(said, highlight=False, markup=False)
            return
        if said:
            print(said, flush=True)
        if now - self.said >= EVERY:
            self.said = now
            speed = (self.done - self.before) / (now - self.begun)
            print(f"{self.done / self.total:.0%} of {self.total:,} bytes, {speed / 1e6:,.1f} MB/s", flush=True)
