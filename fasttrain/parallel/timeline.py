"""When each bucket of one step was full, sent and received."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any


@dataclass
class Moments:
    """Of one bucket, in seconds since the first gradient of the step; NaN: not yet.

    Attributes:
        sent: it was full, its turn had come, and its collective was issued.
        received: the collective was seen to be over. It is looked for when a gradient arrives, so it may be earlier.
    """

    sent: float = float("nan")
    received: float = float("nan")


class Timeline:
    """The moments of one synchronised step.

    Attributes:
        buckets: of each bucket, in the order of sending.
        backward: the end of the backward pass, in seconds since its first gradient.
        end: all buckets had been received and the ranks had agreed.

    Example:
        >>> timeline = Timeline(2)
        >>> timeline.buckets = [Moments(0.1, 0.5), Moments(0.6, 1.2)]
        >>> timeline.backward, timeline.end = 0.8, 1.25
        >>> print(timeline.draw(25))
        bucket 0  ..########...............
        bucket 1  ............############.
        backward  ################---------
        exposed communication: 450.0 ms of 1250.0 ms
    """

    def __init__(self, buckets: int):
        self.count = buckets
        self.begin()

    def begin(self) -> None:
        """The first gradient arrives."""
        self.buckets = [Moments() for _ in range(self.count)]
        self.backward = self.end = float("nan")
        self._zero, self._works = time.perf_counter(), dict[int, Any]()

    def sent(self, index: int, work: Any) -> None:
        """A bucket's collective was issued."""
        self.buckets[index].sent = self._now()
        self._works[index] = work

    def look(self) -> None:
        """Note which collectives are over."""
        for index, work in list(self._works.items()):
            if work.done():
                self.buckets[index].received = self._now()
                del self._works[index]

    def backward_ended(self) -> None:
        """The backward pass is over."""
        self.look()
        self.backward = self._now()

    def ended(self) -> None:
        """The step's gradients are ready."""
        self.look()
        self.end = self._now()

    @property
    def exposed(self) -> float:
        """Seconds of communication that backward did not hide."""
        return self.end - self.backward

    def draw(self, width: int = 60) -> str:
        """As text: a line for each bucket, `#` while it is on its way."""
        scale = width / self.end
        lines = []
        for index, moments in enumerate(self.buckets):
            begin, end = round(moments.sent * scale), round(moments.received * scale)
            lines.append(f"bucket {index:<2} " + "." * begin + "#" * (end - begin) + "." * (width - end))
        done = round(self.backward * scale)
        lines.append("backward  " + "#" * done + "-" * (width - done))
        lines.append(f"exposed communication: {self.exposed * 1e3:.1f} ms of {self.end * 1e3:.1f} ms")
        return "\n".join(lines)

    def _now(self) -> float:
        return time.perf_counter() - self._zero
