"""One save, as who asked for it sees it."""

from __future__ import annotations

from pathlib import Path

from fasttrain.checkpoint.writer import Job


class Saving:
    """One save, under way or done.

    Attributes:
        step: of the training.
        nbytes: of tensors that this rank writes.
        stall_s: how long `save` kept the training waiting.
        skipped: it was not made, as the one before was still being written.
    """

    def __init__(self, step: int, nbytes: int = 0, skipped: bool = False):
        self.step, self.nbytes, self.skipped = step, nbytes, skipped
        self.stall_s = 0.0
        self._job: Job | None = None
        self._path: Path | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended, well or badly."""
        return self._job is None or self._job.done

    def wait(self, timeout_s: float | None = None) -> Path | None:
        """Wait until it is durable.

        Returns:
            The checkpoint's directory, on the first rank; None on the others, which are done when their part is.

        Raises:
            TimeoutError: it is not in time; it goes on.
            Exception: what went wrong.
        """
        return self._path if self._job is None else self._job.wait(timeout_s)
