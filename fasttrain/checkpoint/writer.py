"""The thread that writes: one job at a time, whose error reaches whoever asks next."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from fasttrain.checkpoint.errors import CheckpointError


class WriterDied(CheckpointError):
    """The thread ended without finishing its job: nothing is known of what it has written."""


class Job:
    """Work that was handed to a `Writer`.

    Attributes:
        name: what errors call it.
        told: whether somebody was told that it failed.
    """

    def __init__(self, name: str):
        self.name = name
        self.told = False
        self._ended = False
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    @property
    def done(self) -> bool:
        """Whether it has ended: well, badly, or with its thread."""
        return self._ended or self._dead() is not None

    def wait(self, timeout_s: float | None = None) -> Any:
        """Wait for its end.

        Returns:
            What the work returned.

        Raises:
            TimeoutError: it did not end in time; it goes on.
            WriterDied: its thread is gone.
            Exception: its own error.
        """
        self.join(timeout_s)
        if (error := self.failed()) is not None:
            self.told = True
            raise error
        return self._result

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for its end, whatever it is.

        Raises:
            TimeoutError: it did not end in time; it goes on.
        """
        if self._process == os.getpid() and self._thread is not None:
            self._thread.join(timeout_s)
        if not self.done:
            raise TimeoutError(f"{self.name} has not ended after {timeout_s} s")

    def failed(self) -> BaseException | None:
        """Why it failed, if it did."""
        if not self._ended:
            return self._dead()
        if self._error is None or isinstance(self._error, Exception):
            return self._error
        died = WriterDied(f"{self.name}: its thread was ended by {type(self._error).__name__}: {self._error}")
        died.__cause__ = self._error
        return died

    def run(self, work: Callable[[], Any], nice: int) -> None:
        """The body of the thread."""
        try:
            if nice:
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)  # on Linux of the thread alone
            self._result = work()
        except BaseException as error:  # whatever it is: `wait` and `failed` hand it on
            self._error = error
        self._ended = True

    def _dead(self) -> WriterDied | None:
        if self._process != os.getpid():
            return WriterDied(f"{self.name} runs in process {self._process}, of which this is a fork: threads are not "
                              f"forked")
        if self._thread is None or not self._thread.is_alive():
            # It may have ended between the two looks.
            return None if self._ended else WriterDied(f"{self.name}: its thread is gone, and its work is not done")
        return None


class Writer:
    """One job at a time, in a thread of its own; hashing and writing need the interpreter lock only between blocks.

    The thread is begun with the job and ends with it: at the end of the program Python waits for it, so that a save
    that was begun is finished.

    Arguments:
        nice: added to the thread's niceness, so that training goes first; 0 to 19.

    Example:
        >>> from fasttrain.checkpoint import Writer
        >>> writer = Writer()
        >>> writer.submit(lambda: 6 * 7, "the save of step 3").wait()
        42
        >>> job = writer.submit(lambda: 1 / 0, "the save of step 4")
        >>> writer.submit(print, "the save of step 5")
        Traceback (most recent call last):
            ...
        ZeroDivisionError: division by zero
        in the save of step 4
    """

    def __init__(self, nice: int = 0):
        if not 0 <= nice <= 19:
            raise ValueError(f"nice must be from 0 to 19, not {nice}")
        self._nice = nice
        self._job: Job | None = None

    @property
    def busy(self) -> bool:
        """Whether a job runs."""
        return self._job is not None and not self._job.done

    def submit(self, work: Callable[[], Any], name: str = "a job") -> Job:
        """Begin some work, after the work before it has ended.

        Arguments:
            work: called in the thread.
            name: what errors call it.

        Raises:
            WriterDied, Exception: the work before it failed, and nobody was told yet. This one is not begun.
        """
        self.wait()
        job = Job(name)
        job._thread = threading.Thread(target=job.run, args=(work, self._nice), name=f"writer: {name}")
        self._job = job
        job._thread.start()
        return job

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait for the end of what runs, and raise its error if nobody was told yet.

        Raises:
            TimeoutError: it did not end in time.
            WriterDied, Exception: it failed.
        """
        if (job := self._job) is None:
            return
        job.join(timeout_s)
        self._job = None
        if not job.told and (error := job.failed()) is not None:
            job.told = True
            error.add_note(f"in {job.name}")
            raise error

    def check(self) -> None:
        """Raise the error of what has ended, if nobody was told yet; it never waits."""
        if self._job is not None and self._job.done:
            self.wait()
