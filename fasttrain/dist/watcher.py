"""Who has failed, and why: one thread for each process that tells the others and listens to them.

The first rank to fail writes its number and its cause to the store and ends; every other hears of it within half a second,
raises `PeerFailed` where it waits for a collective, and ends a little later even if it waits inside torch. A rank that
dies or stops without a word is missed as soon as others wait for it: by its process if it ran on the same machine,
else by its heartbeat.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fasttrain.dist.failures import FAILED, PEER_FAILED, PeerFailed, end_process, first_words, is_about_a_connection
from fasttrain.dist.peers import Heard, Identity, Operation, Said, disagreement
from fasttrain.dist.work import WireError

__all__ = ["FAILED", "PEER_FAILED", "PeerFailed", "Watcher"]

END_S = 1.5  # from a rank's own failure to its end: time for a traceback
TICK_S, HURRIED_TICK_S = 0.25, 0.05
PATIENCE_S = 3.0  # of `explain`: longer than it takes to miss a heartbeat
TELL_S = 1.0  # that a failing rank waits for the store to take its words
KEPT = 16  # collectives that a rank tells of: enough to find where two ranks parted


class Watcher:
    """The watcher of this process; one is enough for all its wires.

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
        number = dist.PrefixStore("fasttrain/watchers", store).add(str(self.rank), 1)  # the same on every rank
        self._store = dist.PrefixStore(f"fasttrain/watcher {number}", store)
        self.step: int | None = None
        self.stop_requested = False
        self.heard = Heard()
        self._operations: deque[Operation] = deque(maxlen=KEPT)
        self._beats = 0
        self._others = {rank: None for rank in range(self.size) if rank != self.rank}
        self._identities: dict[int, Identity] = {}
        self._news: dict[str, Any] | None = None  # the failure, once it is known
        self._report: dict[str, Any] | None = None  # one that is to be told
        self._told, self._awake = threading.Event(), threading.Event()
        self._hurried_until, self._asked, self._closing = 0.0, False, False
        self._failed = self._ending = False
        self._lost_store = ""
        self._on_stop: Callable[[], None] | None = None
        self._store.set(f"who {self.rank}", json.dumps(Identity.own()))
        self._say()
        self._hook, sys.excepthook = sys.excepthook, self._excepthook
        atexit.register(self.close)
        self._thread = threading.Thread(target=self._run, name="fasttrain watcher", daemon=True)
        self._thread.start()

    # --- This rank ----------------------------------------------------------------------------------------------------

    def fail(self, cause: BaseException | str) -> int:
        """Tell every rank that this one has failed, and end this process a second and a half later by ``os._exit``.

        Nothing is torn down: destroying a process group with collectives under way blocks.

        Returns:
            The exit code: 70; 71 if `cause` is only the echo of another rank's failure.
        """
        echo = isinstance(cause, PeerFailed)
        if isinstance(cause, RuntimeError) and self._news is None and is_about_a_connection(cause):
            echo = self.explain() is not None  # raised by a collective of torch's own
        if self._news is None and not echo:
            self._failed, self._report = True, self._blame(self.rank, first_words(cause))
            self._awake.set()
            self._told.wait(TELL_S)
        other = self._news is not None and self._news["rank"] not in (None, self.rank)
        code = PEER_FAILED if echo or other else FAILED
        self._end_in(END_S, code)
        return code

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """An exception that leaves this block is told to the other ranks, and ends this process, caught or not."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def catch_sigterm(self, on_stop: Callable[[], None] | None = None) -> None:
        """Take SIGTERM for a request to stop, unless it came because a rank failed. Call it in the main thread.

        torchrun sends SIGTERM to the others half a second after one process has failed: the failure is looked for first.

        Arguments:
            on_stop: called in the watcher's thread; None: `stop_requested` becomes true, for the program to look at.
        """
        self._on_stop = on_stop
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_asked", True))  # takes no lock: it may interrupt any

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
        if number == 1:  # of a new group, whose name an older one may have had
            self._operations = deque((o for o in self._operations if o.wire != wire), KEPT)
        self._operations.append(Operation(wire, number, kind, nbytes))

    def failure(self) -> WireError | None:
        news = self._news
        if news is None:
            return None
        return WireError(news["cause"]) if news["rank"] is None else PeerFailed(**news)

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
            if found := self.failure() or self._left():
                return found
            if self._lost_store:
                break
            time.sleep(0.02)
        return self.silent(3 * self.beat_s) or (WireError(self._lost_store) if self._lost_store else None)

    def silent(self, quiet_s: float) -> PeerFailed | None:
        quiet_s = max(quiet_s, 3 * self.beat_s)
        for rank in self._others:
            if (quiet := self.heard.quiet(rank)) > quiet_s:
                stopped = self._state(rank) == "stopped"
                how = "its process is stopped (SIGSTOP)" if stopped else "its heartbeat stopped"
                blame = self._blame(rank, f"{how}, no sign of life for {quiet:.1f} s")
                self._report = self._report or blame
                self._awake.set()
                return PeerFailed(**blame)
        return self._left()

    def whereabouts(self) -> str:
        return f"{self.heard}{f'; {self._lost_store}' if self._lost_store else ''}"

    def _left(self) -> PeerFailed | None:
        for rank, said in self.heard.said.copy().items():
            if said.left:
                return PeerFailed(rank, "its program came to its end while others waited for it", said.step)
        return None

    # --- The thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        beat_at = 0.0
        while not self._closing:
            hurried = time.monotonic() < self._hurried_until
            self._awake.wait(HURRIED_TICK_S if hurried else TICK_S)
            self._awake.clear()
            try:
                if time.monotonic() >= beat_at:
                    self._say()
                    beat_at = time.monotonic() + self.beat_s
                if self._asked or time.monotonic() < self._hurried_until:
                    self._look()
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
            self._say(left=True)

    def _say(self, left: bool = False) -> None:
        self._beats += 1
        said = Said(self._beats, self.step, tuple(self._operations.copy()), left)
        self._store.set(f"beat {self.rank}", said.to_json())

    def _tell_and_listen(self) -> None:
        if self._news is None and self._report is not None:
            self._store.compare_set("failure", "", json.dumps(self._report))  # the first one stays
        if self._news is None and self._store.check(["failure"]):
            self._news = json.loads(self._store.get("failure"))
        if self._report is not None:
            self._told.set()

    def _look(self) -> None:
        """At every peer: its process, its last words, and whether it issues the same collectives."""
        gone = [rank for rank in self._others if self._state(rank) == "gone"]  # first: its last words say if it left
        for rank in self._others:
            if self._store.check([f"beat {rank}"]):
                self.heard.hear(rank, Said.from_json(self._store.get(f"beat {rank}")))
            if rank not in self._identities and self._store.check([f"who {rank}"]):
                self._identities[rank] = Identity(*json.loads(self._store.get(f"who {rank}")))
        said = self.heard.said
        dead = [rank for rank in gone if not said[rank].left]
        words = disagreement({**{rank: said[rank].operations for rank in said}, self.rank: self._operations.copy()})
        if dead:
            pid = self._identities[dead[0]].pid
            self._report = self._report or self._blame(
                dead[0], f"process {pid} ended without a word: killed, perhaps for want of memory")
        elif words is not None:
            self._report = self._report or {"rank": None, "cause": f"the ranks issue different collectives: {words}",
                                            "step": self.step}

    def _state(self, rank: int) -> str | None:
        return self._identities[rank].state() if rank in self._identities else None

    def _blame(self, rank: int, cause: str) -> dict[str, Any]:
        said = self.heard.said.get(rank)
        return {"rank": rank, "cause": cause, "step": self.step if rank == self.rank else said.step if said else None}

    def _stop(self) -> None:
        self._asked = False
        if self._on_stop is None:
            self.stop_requested = True
        else:
            with contextlib.suppress(RuntimeError):
                self._say(left=True)
            self._on_stop()

    # --- The end ------------------------------------------------------------------------------------------------------

    def _announce(self, news: dict[str, Any]) -> None:
        """The end of this process, if not under way, because of another rank's failure."""
        if self._failed:
            return  # by its own account: `fail` ends it
        if self.grace_s is not None:
            mine = news["rank"] == self.rank
            self._end_in(self.grace_s, FAILED if mine or news["rank"] is None else PEER_FAILED, str(self.failure()))

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
        end_process(self.fail(error))  # an ordinary exit would wait for collectives that never end
