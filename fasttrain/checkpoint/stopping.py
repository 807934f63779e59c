"""The end of a run that was asked to stop: all ranks save the same step, and after a loss none saves anything."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fasttrain.dist.control import Control, Pending
from fasttrain.dist.failures import INTERRUPTED, end_process
from fasttrain.dist.watcher import Watcher
from fasttrain.dist.wire import Wire
from fasttrain.parallel import DataParallel, Reducer

STOPPED = 128 + signal.SIGTERM  # exit code after a save that a signal asked for; of Ctrl-C it is INTERRUPTED


class Stopping:
    """Takes SIGTERM and Ctrl-C for wishes to stop, and says when: after the same step on every rank.

    A wish of one rank travels in the small collective that ends every synchronised step, so all know of it after the
    next step (on a GPU the one after that). A second Ctrl-C ends the process at once, by exit code 130: what was saved
    stays, what was being written is left unfinished. A SIGTERM that came because another rank failed (torchrun sends
    one) is no wish: `requested` raises that failure.

    Arguments:
        over: the `DataParallel` or `Reducer` that reduces the gradients; or a `Wire` to the other ranks, over which
            `requested` then sends a message of its own; None: there is one process.
        signals: that ask to stop.

    Attributes:
        reason: the signal that asked this process, by its name; None if none has.

    Example:
        >>> with Stopping() as stopping:
        ...     for step in range(1, 1000):
        ...         os.kill(os.getpid(), signal.SIGTERM)
        ...         if reason := stopping.requested(step):  # the loop saves here, and ends with stopping.exit_code
        ...             break
        >>> step, reason, stopping.exit_code
        (1, 'SIGTERM', 143)
    """

    def __init__(self, over: DataParallel | Reducer | Wire | None = None,
                 signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT)):
        self.signals = tuple(signals)
        self.reason: str | None = None
        over = over.reducer if isinstance(over, DataParallel) else over
        if over is not None and not isinstance(over, (Reducer, Wire)):
            raise TypeError(f"Stopping takes a DataParallel, a Reducer, a Wire or None, not a {type(over).__name__}")
        self.reducer = over if isinstance(over, Reducer) else None
        self.wire: Wire | None = over.wire if isinstance(over, Reducer) else over
        self._alone = self.wire is None or self.wire.size == 1
        self._control: Control | None = None
        if self.wire is not None and self.reducer is None and not self._alone:
            self._control = Control(self.wire, agreed=("step",))
        self._pending: Pending | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """With what a process should end that has stopped for this: 130 after Ctrl-C, else 143."""
        return INTERRUPTED if self.reason == "SIGINT" else STOPPED

    def __enter__(self) -> Stopping:
        """Take the signals; only in the main thread there are any to take."""
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                self._before[number] = signal.getsignal(number)
                if number == signal.SIGTERM and self._watcher is not None:
                    self._watcher.catch_sigterm()  # looks first whether a rank has failed
                else:
                    signal.signal(number, self._asked)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    @property
    def _watcher(self) -> Watcher | None:
        watch = None if self.wire is None else self.wire.watch
        return watch if isinstance(watch, Watcher) else None

    def _asked(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            os.write(2, b"fasttrain: ended by the second Ctrl-C; what was saved before stays\n")
            end_process(INTERRUPTED)
        self.ask(signal.Signals(number).name)

    def ask(self, reason: str) -> None:
        """Wish to stop, for whatever reason: an early end that one rank decides on, for example."""
        self.reason = self.reason or reason
        if self.reducer is not None:
            self.reducer.stop = True

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop; the others do not know of it yet."""
        if self._watcher is not None and self._watcher.stop_requested:
            self.ask("SIGTERM")
        return self.reason is not None

    def requested(self, step: int) -> str | None:
        """Whether to stop after this step, and why; the same step on every rank. Call it after each, on every rank.

        Arguments:
            step: how many steps were made.

        Returns:
            The reason; of a rank that was not asked itself "another rank". None: go on.

        Raises:
            WireError: another rank has failed: nothing may be saved.
        """
        self._check_peers()
        asked = self.asked
        if self._alone:
            return self.reason if asked else None
        outcome = self.reducer.known if self.reducer is not None else self._exchange(step)
        return (self.reason or "another rank") if outcome is not None and outcome.stop else None

    def _exchange(self, step: int) -> Any:
        """What all ranks wish, by a message of our own; on a GPU that of the step before."""
        assert self._control is not None
        before, self._pending = self._pending, self._control.send([step], stop=self.reason is not None)
        if self._control.wire.device.type == "cpu":
            return self._pending.read()
        return None if before is None else before.read()

    def _check_peers(self) -> None:
        if self.wire is not None and (failure := self.wire.watch.failure()) is not None:
            raise failure

    def may_save(self, error: BaseException | None = None, everywhere: tuple[type[BaseException], ...] = (
            FloatingPointError,)) -> bool:
        """Whether the state may be saved now.

        Arguments:
            error: that ends the run. With several ranks it has to be one that all of them raise in the same step.
            everywhere: kinds of such errors.

        Returns:
            False after the loss of a rank, or where only this rank has come to an end.
        """
        if self.wire is not None and self.wire.watch.failure() is not None:
            return False
        return error is None or self._alone or isinstance(error, everywhere)

    @contextmanager
    def saving(self, save: Callable[[str], Any]) -> Iterator[None]:
        """A context for the loop: an exception that leaves it, and may be saved after, calls `save` with its name.

        The exception goes on; if `save` fails, that is noted in it.
        """
        try:
            yield
        except Exception as error:
            if self.may_save(error):
                try:
                    save(type(error).__name__)
                except Exception as failure:
                    error.add_note(f"and its state could not be saved: {type(failure).__name__}: {failure}")
            raise
