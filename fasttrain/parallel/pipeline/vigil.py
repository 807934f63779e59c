"""Torch waits for messages between stages without looking up; this looks for it, so that no rank waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Sized
from typing import Any

from fasttrain.dist.failures import is_about_a_connection
from fasttrain.dist.watcher import Watcher
from fasttrain.dist.wire import Wire
from fasttrain.dist.work import LOOK_AFTER_S, SILENT_AFTER, SLICE_S
from fasttrain.parallel.unfinished import Cause, tell


class Vigil:
    """A context around what waits inside torch: it tells the watcher of this process that somebody waits.

    The watcher ends the process where a rank has failed, ended or stopped; without one the timeout of torch's process
    group does.

    Arguments:
        wire: of the pipeline.
        progress: grows while there is any.
    """

    def __init__(self, wire: Wire, progress: Sized):
        self.wire, self.progress = wire, progress
        self._inside = False
        self._entered = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        if not isinstance(self.wire.watch, Watcher) or self.wire.size == 1:
            return
        self._inside = True
        self._entered.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, name="fasttrain pipeline", daemon=True)
            self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        self._inside = False
        self._entered.clear()
        if isinstance(error, Exception):  # not Ctrl-C, which ends the program anyway
            self._failed(error)

    def _look(self) -> None:
        watch, limit = self.wire.watch, self.wire.timeout_s
        while not self._closed:
            self._entered.wait()
            seen, since = -1, time.monotonic()
            while self._inside:
                if len(self.progress) != seen:
                    seen, since = len(self.progress), time.monotonic()
                waited = time.monotonic() - since
                if waited > min(LOOK_AFTER_S, limit / 5):
                    watch.hurry()
                if waited > SILENT_AFTER * limit:
                    watch.silent(limit / 2)
                time.sleep(SLICE_S)

    def _failed(self, error: Exception) -> None:
        """An exception in the middle of a step: the other ranks wait for this one, and are told.

        Raises:
            PeerFailed: it is the echo of another rank's failure, a lost connection.
            Exception: what the stage raised, where torch has put another around it.
        """
        cause = own = unwrapped(error)
        if isinstance(own, RuntimeError) and is_about_a_connection(own):
            cause = self.wire.watch.explain() or own
        tell(self.wire, Cause(cause))
        if cause is not error:
            raise cause from (None if cause is own else error)

    def close(self) -> None:
        """Let the thread end."""
        self._closed = True
        self._entered.set()


def unwrapped(error: BaseException) -> BaseException:
    """What a stage raised: torch raises an error of its own around it, with the shapes of the stage's inputs."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None and any(
            words in str(error) for words in ("failed to run forward", "Failed to run stage backward")):
        where = str(error).strip().splitlines()[0].rstrip(":")
        error = error.__cause__
        if where not in getattr(error, "__notes__", ()):
            error.add_note(where)
    return error
