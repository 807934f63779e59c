"""Numbers of a device on the host, a step later: what nothing has to wait for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

WIDE = (torch.float64, torch.int64, torch.int32)  # float32 would not hold their numbers


class Arrived(NamedTuple):
    """What was put in `delay` steps ago.

    Attributes:
        step: of which step.
        values: by name, a number, or a list of numbers of a tensor with several elements; None as it was given.
        note: whatever was given with them.
    """

    step: int
    values: dict[str, Any]
    note: Any


def send(vector: Tensor) -> tuple[Tensor, Callable[[], bool], Callable[[], None]]:
    """A tensor on its way to the host: where it will be, whether it is there, and what waits for it.

    The copy lies in pinned memory that torch keeps for the next.
    """
    here = vector.to("cpu", non_blocking=True)
    event = torch.cuda.current_stream(vector.device).record_event()
    return here, event.query, event.synchronize


class Later:
    """Takes the numbers of a step and gives those of the step `delay` before: the host looks at what has long arrived.

    A guard that asked the device for a loss in the step itself would have the host wait for all that is queued. The
    delay is exact, whatever the device has done by then, so that several processes decide the same in the same step.
    Numbers of the host, and tensors on the CPU, are read at once and given as late.

    Arguments:
        delay: in steps; 0 waits for the device in every step.

    Attributes:
        waits: how often a number had not arrived when it was due.

    Raises:
        ValueError: a negative delay.

    Example:
        >>> later = Later()
        >>> later.put(0, loss=torch.tensor(2.0), batch=None) is None
        True
        >>> later.put(1, loss=1.5)
        Arrived(step=0, values={'loss': 2.0, 'batch': None}, note=None)
        >>> [arrived.step for arrived in later.flush()]
        [1]
    """

    def __init__(self, delay: int = 1):
        if isinstance(delay, bool) or not isinstance(delay, int) or delay < 0:
            raise ValueError(f"delay={delay!r} must be a whole number of steps, and not negative")
        self.delay, self.waits = delay, 0
        self._pending: deque[tuple[int, dict[str, Any], Any, Any, Any]] = deque()

    def put(self, step: int, note: Any = None, **values: Tensor | float | None) -> Arrived | None:
        """Take the numbers of a step; those of the step that is due, or None while there is none.

        Arguments:
            step: its number.
            note: kept with them.
            values: numbers, or tensors, whose values are those of now, whatever becomes of them later.
        """
        known: dict[str, Any] = {}
        sent = []
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = value.detach()
                if value.device.type == "cpu":
                    known[name] = value.item() if value.numel() == 1 else value.flatten().tolist()
                else:
                    sent.append((name, value))
            else:
                known[name] = value
        way = None
        if sent:
            tensors = [value.reshape(-1) for _, value in sent]
            kind = torch.float64 if any(one.dtype in WIDE for one in tensors) else torch.float32
            way = send(torch.cat([one.to(kind) for one in tensors]))
        self._pending.append((step, known, note, way, [(name, value.numel()) for name, value in sent]))
        return self._take() if len(self._pending) > self.delay else None

    def flush(self) -> list[Arrived]:
        """Everything that has not been given yet; waits for the device."""
        return [self._take() for _ in range(len(self._pending))]

    def _take(self) -> Arrived:
        step, values, note, way, sizes = self._pending.popleft()
        if way is not None:
            here, arrived, wait = way
            if not arrived():
                self.waits += 1
                wait()
            values |= _cut(here.tolist(), sizes)
        return Arrived(step, values, note)


def _cut(numbers: list[float], sizes: Sequence[tuple[str, int]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    first = 0
    for name, size in sizes:
        made[name] = numbers[first] if size == 1 else numbers[first : first + size]
        first += size
    return made
