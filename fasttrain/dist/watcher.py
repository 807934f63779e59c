"""Who has failed, and why: one thread for each process that tells the others and listens to them.

The first rank to fail writes its number and its cause to the store and ends; every other hears of it within half a second,
raises `PeerFailed` where it waits for a collective, and ends a little later even if it waits inside torch. A rank that
dies or stops without a word is missed as soon as others wait for it: by its process if it ran on the same machine,
else by its heartbeat.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fasttrain.dist.board import Board, Failure
from fasttrain.dist.failures import (
    FAILED,
    INTERRUPTED,
    PEER_FAILED,
    PeerFailed,
    end_process,
    first_words,
    is_about_a_connection,
)
from fasttrain.dist.peers import Operation
from fasttrain.dist.work import SLICE_S, WireError

END_S = 1.0  # from a rank's own failure to its end: time for a traceback
TICK_S, HURRIED_TICK_S = 0.25, 0.05
PATIENCE_S = 3.0  # of `explain`: longer than it takes to miss a heartbeat
TELL_S = 1.0  # that a failing rank waits for the store to take its words


class Watcher:
    """The watcher of this process; one is enough for all its wires. It is no watcher of processes that are forked off.

    Args:
        grace_s: from the news of a failure to the end of this process by ``os._exit``, whatever it does meanwhile:
            where torch itself waits nothing else ends it. None: it does not end by itself.
        store: where the ranks meet; None: the store of torch.distributed, which has been initialized.
        rank, size: None: those of torch.distributed.
        beat_s: seconds between heartbeats; None: half a second, more for over 500 ranks.

    Attributes:
        step: the training step, which the program sets: it is told with a failure.
        stop_requested: SIGTERM came, and nobody had failed: see `catch_sigterm`.

    Example:
        watcher = Watcher()
        wire = Wire(device, watch=watcher)
        with watcher.guard():
            train(wire)
        watcher.close()
    """

    def __init__(self, grace_s: float | None = 2.0, store: Any = None, rank: int | None = None,
                 size: int | None = None, beat_s: float | None = None):
        self.rank = dist.get_rank() if rank is None else rank
        self.size = dist.get_world_size() if size is None else size
        self.grace_s = grace_s
        self.beat_s = max(0.5, self.size / 1000) if beat_s is None else beat_s
        store = dist.distributed_c10d._get_default_store() if store is None else store
        store = store.clone()  # a connection of its own
        store.set_timeout(timedelta(seconds=PATIENCE_S))
        self.board = Board(store, self.rank, self.size)
        self.stop_requested = False
        self._news: Failure | None = None  # once it is known
        self._report: Failure | None = None  # one that is to be told
        self._told, self._awake = threading.Event(), threading.Event()
        self._hurried_until, self._asked, self._closing = 0.0, False, False
        self._failed = self._ending = False
        self._lost_store = ""
        self._on_stop: Callable[[], None] | None = None
        self._pid = os.getpid()
        self._hook, sys.excepthook = sys.excepthook, self._excepthook
        atexit.register(self.close)
        self._thread = threading.Thread(target=self._run, name="fasttrain watcher", daemon=True)
        self._thread.start()

    @property
    def step(self) -> int | None:
        return self.board.step

    @step.setter
    def step(self, step: int | None) -> None:
        self.board.step = step

    # --- This rank ----------------------------------------------------------------------------------------------------

    def fail(self, cause: BaseException | str) -> int:
        """Tell every rank that this one has failed, and end this process a second later by ``os._exit``.

        Nothing is torn down: destroying a process group with collectives under way blocks.

        Returns:
            The exit code: 70; 71 if `cause` is only the echo of another rank's failure; 130 for Ctrl-C.
        """
        echo = isinstance(cause, PeerFailed)
        if isinstance(cause, RuntimeError) and self._news is None and is_about_a_connection(cause):
            echo = self.explain() is not None  # raised by a collective of torch's own
        if self._news is None and not echo:
            self._failed, self._report = True, self.board.blame(self.rank, first_words(cause))
            self._awake.set()
            self._told.wait(TELL_S)
        other = self._news is not None and self._news["rank"] not in (None, self.rank)
        code = PEER_FAILED if echo or other else INTERRUPTED if isinstance(cause, KeyboardInterrupt) else FAILED
        self._end_in(END_S, code)
        return code

    def in_trouble(self, words: object) -> None:
        """This rank may be unable to go on: the others are told if they wait for it, and it does not soon `go_on`.

        Arguments:
            words: the cause, as text when it is told.
        """
        self.board.trouble = words, time.monotonic()

    def go_on(self) -> None:
        """It is in trouble no longer."""
        self.board.trouble = None

    def ends_within(self, seconds: float) -> bool:
        """Whether this process is about to end, or has taken leave, at the latest after so many seconds: waits for it."""
        end = time.monotonic() + seconds
        while not (self._ending or self._closing) and time.monotonic() < end:
            time.sleep(SLICE_S)
        return self._ending or self._closing

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """An exception that leaves this block, ``sys.exit`` too, is told to the others and ends this process, caught
        or not.

        Raises:
            PeerFailed: in the place of an error of torch's own collectives that only says that a connection was lost.
        """
        try:
            yield
        except BaseException as error:
            cause = self._cause(error)
            self.fail(cause)
            if cause is not error:
                raise cause from error
            raise

    def _cause(self, error: BaseException) -> BaseException:
        """The failure of another rank, of which an error of torch's collectives is the echo; else the error itself."""
        echo = isinstance(error, RuntimeError) and not isinstance(error, WireError) and is_about_a_connection(error)
        return (echo and self.explain()) or error

    def catch_sigterm(self, on_stop: Callable[[], None] | None = None) -> None:
        """Take SIGTERM for a request to stop, unless it came because a rank failed. Call it in the main thread.

        torchrun sends SIGTERM to the others half a second after one process has failed: the failure is looked for first.

        Arguments:
            on_stop: called in the watcher's thread; None: `stop_requested` becomes true, for the program to look at.
        """
        self._on_stop = on_stop
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def close(self) -> None:
        """Take leave: the end of this process is no failure. Call it when the collectives are over."""
        if self._closing:
            return
        self._closing = True
        if sys.excepthook == self._excepthook:
            sys.excepthook = self._hook
        atexit.unregister(self.close)
        self._awake.set()
        self._thread.join(PATIENCE_S)

    # --- As a work uses it: `fasttrain.dist.work.Watch` ---------------------------------------------------------------

    def issued(self, wire: str, number: int, kind: str, nbytes: int) -> None:
        self.board.note(Operation(wire, number, kind, nbytes))

    def failure(self) -> WireError | None:
        return error_of(self._news)

    def hurry(self) -> None:
        now = time.monotonic()
        fresh = now > self._hurried_until
        self._hurried_until = now + 1
        if fresh:
            self._awake.set()

    def explain(self) -> WireError | None:
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            self.hurry()
            if found := self.failure() or error_of(self.board.left()):
                return found
            if self._lost_store:
                break
            time.sleep(0.02)
        return self.silent(3 * self.beat_s) or (WireError(self._lost_store) if self._lost_store else None)

    def silent(self, quiet_s: float) -> WireError | None:
        if (found := self.board.quiet(max(quiet_s, 3 * self.beat_s))) is not None:
            self._report = self._report or found
            self._awake.set()
        return error_of(found or self.board.left())

    def whereabouts(self) -> str:
        return f"{self.board.heard}{f'; {self._lost_store}' if self._lost_store else ''}"

    # --- The thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        beat_at = 0.0
        while not self._closing:
            hurried = time.monotonic() < self._hurried_until
            self._awake.wait(HURRIED_TICK_S if hurried else TICK_S)
            self._awake.clear()
            try:
                if time.monotonic() >= beat_at:
                    self.board.say()
                    beat_at = time.monotonic() + self.beat_s
                if self._asked or time.monotonic() < self._hurried_until:
                    self._report = self.board.look() or self._report
                self._tell_and_listen()
                self._lost_store = ""
            except RuntimeError as error:  # torch's name for every failure of a store
                self._lost_store = f"the store does not answer, so its host has ended, too ({first_words(error)})"
                self._news = self._news or self._report  # at least this process knows
            if self._news is not None:
                self._announce(self._news)
            elif self._asked:
                self._stop()
        with contextlib.suppress(RuntimeError):  # a store that has gone before us: nobody is left to hear
            self.board.say(left=True)

    def _tell_and_listen(self) -> None:
        if self._news is None and self._report is not None:
            self.board.tell(self._report)
        self._news = self._news or self.board.listen()
        if self._report is not None:
            self._told.set()

    def _stop(self) -> None:
        self._asked = False
        if self._on_stop is None:
            self.stop_requested = True
        else:
            with contextlib.suppress(RuntimeError):
                self.board.say(left=True)
            self._on_stop()

    # --- The end ------------------------------------------------------------------------------------------------------

    def _announce(self, news: Failure) -> None:
        """The end of this process, if not under way, because of another rank's failure."""
        if self._failed:
            return  # by its own account: `fail` ends it
        if self.grace_s is not None:
            mine = news["rank"] == self.rank
            self._end_in(self.grace_s, FAILED if mine or news["rank"] is None else PEER_FAILED, str(self.failure()))

    def _on_sigterm(self, *_: Any) -> None:
        """Takes no lock: it may have interrupted whoever holds it."""
        self._asked = True
        if os.getpid() != self._pid:  # a forked child, which has no watcher: as if it had no handler
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def _end_in(self, seconds: float, code: int, words: str = "") -> None:
        if self._ending:
            return
        self._ending = True
        if words:
            os.write(2, f"fasttrain: rank {self.rank} ends: {words}\n".encode())

        def end() -> None:
            time.sleep(seconds)
            end_process(code)

        threading.Thread(target=end, name="fasttrain end", daemon=True).start()

    def _excepthook(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        self._hook(kind, error, trace)
        if os.getpid() != self._pid:
            return
        end_process(self.fail(error))  # an ordinary exit would wait for collectives that never end


def error_of(failure: Failure | None) -> WireError | None:
    """A failure as an exception."""
    if failure is None:
        return None
    return WireError(failure["cause"]) if failure["rank"] is None else PeerFailed(**failure)
