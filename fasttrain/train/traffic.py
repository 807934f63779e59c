"""What the steps of a run send, and how long they wait for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fasttrain.dist.wire import Wire


class Traffic:
    """Adds up, over steps and not what lies between them, the bytes of wires and the seconds that they were waited for.

    What is waited for is what computation did not hide. On a GPU the host does not wait, and nothing is measured.

    Example:
        traffic = Traffic([wire])
        for batch in batches:
            traffic.begin()
            loss_of(model, batch).backward()
            hidden_by_nothing = traffic.waited()
            optimizer.step()
            hidden_by_nothing += traffic.waited()
            traffic.end()
        traffic.per_step()
    """

    def __init__(self, wires: Sequence[Wire]):
        self.wires = wires
        self.steps, self.bytes, self.seconds = 0, 0, 0.0

    def _sums(self) -> tuple[int, float]:
        return sum(wire.sent for wire in self.wires), sum(wire.waits.seconds for wire in self.wires)

    def begin(self) -> None:
        """A step begins."""
        self._sent, self._waited = self._sums()

    def waited(self) -> float:
        """Seconds of waiting since the step began, or since the last call in it."""
        before, (_, self._waited) = self._waited, self._sums()
        self.seconds += self._waited - before
        return self._waited - before

    def end(self) -> None:
        """A step has ended."""
        self.waited()
        self.bytes += self._sums()[0] - self._sent
        self.steps += 1

    def per_step(self, all_counted: bool = True) -> dict[str, Any]:
        """Means over the steps: bytes, and seconds of communication that nothing hid. None: not measured.

        Arguments:
            all_counted: all that is sent goes through these wires.
        """
        on_gpu = self.wires[0].device.type == "cuda"
        return {"bytes": self.bytes / self.steps if all_counted else None,
                "exposed_s": None if on_gpu else self.seconds / self.steps}
