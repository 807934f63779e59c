"""A collective under way, and how it is waited for: in short slices, never for ever, and with the cause of a failure."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

SLICE_S = 0.05  # between two looks at what has failed; a result ends the wait at once
LOOK_AFTER_S = 1.0  # from then on the watcher looks at every peer (a fifth of the timeout if that is less)
SILENT_AFTER = 0.8  # of the timeout: from then on a peer that gives no sign of life is given up


class WireError(RuntimeError):
    """A collective failed: a peer ended, or did not answer in time. The peer's own report says why."""


class Watch(Protocol):
    """Who knows what has become of the peers: `fasttrain.dist.watcher.Watcher`.

    Attributes:
        step: the training step, which the program sets.
    """

    step: int | None

    def issued(self, wire: str, number: int, kind: str, nbytes: int) -> None:
        """Take note of a collective."""

    def failure(self) -> Exception | None:
        """The failure that this process has heard of, if any. Never waits."""

    def hurry(self) -> None:
        """Somebody waits: look at every peer, and more often. Never waits."""

    def explain(self) -> Exception | None:
        """Why a connection was lost: what its rank reported, or that it is gone. Waits some seconds at most."""

    def silent(self, quiet_s: float) -> Exception | None:
        """A peer that has given no sign of life for so long. Never waits."""

    def whereabouts(self) -> str:
        """What each peer said last of itself, for the message of a timeout. Never waits."""


class Nobody:
    """The watch of a wire that has none."""

    def __init__(self) -> None:
        self.step: int | None = None

    def issued(self, wire: str, number: int, kind: str, nbytes: int) -> None:
        """Nobody remembers."""

    def hurry(self) -> None:
        """Nobody looks."""

    def failure(self) -> None:
        """Nothing is known."""

    def silent(self, quiet_s: float) -> None:
        """Nobody is missed."""

    explain = failure

    def whereabouts(self) -> str:
        return ""


@dataclass
class Waits:
    """How long a program has waited for the works of a wire."""

    seconds: float = 0.0


class Post(NamedTuple):
    """What every work of a wire needs to wait."""

    rank: int
    size: int
    timeout_s: float
    watch: Watch
    waits: Waits


class Work:
    """A collective under way. `wait` returns its result; what that is stands at the method that issued it."""

    def __init__(self, post: Post, kind: str, nbytes: int):
        self.post, self.kind, self.nbytes = post, kind, nbytes

    def done(self) -> bool:
        """Whether it has ended, well or badly. Never waits."""
        raise NotImplementedError

    def wait(self) -> Any:
        """Wait until it has ended.

        Raises:
            PeerFailed: another rank has failed, or ended: which, and why, if there is a watcher.
            WireError: it failed, or took longer than the wire's timeout; names the operation, its bytes and this rank.
        """
        begun = time.monotonic()
        try:
            return self._wait(begun)
        finally:
            self.post.waits.seconds += time.monotonic() - begun

    def _wait(self, begun: float) -> Any:
        watch, limit = self.post.watch, self.post.timeout_s
        while True:
            try:
                if self._rest(min(SLICE_S, limit)):
                    return self._result()
            except RuntimeError as error:
                raise self._failed(error, time.monotonic() - begun) from error
            waited = time.monotonic() - begun
            if waited > min(LOOK_AFTER_S, limit / 5):
                watch.hurry()
            cause = watch.failure()
            if cause is None and waited > SILENT_AFTER * limit:
                cause = watch.silent(limit / 2)
            if cause is not None:
                raise cause
            if waited > limit:
                raise WireError(f"{self._name()}: no answer in {waited:.1f} s{watch.whereabouts()}{flight_recorder()}")

    def _rest(self, seconds: float) -> bool:
        """Wait for the end, so long at most; whether it has ended. Raises RuntimeError if it failed."""
        raise NotImplementedError

    def _result(self) -> Any:
        return None

    def _failed(self, error: RuntimeError, seconds: float) -> Exception:
        if isinstance(error, WireError):
            return error
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return self.post.watch.explain() or WireError(f"{self._name()}, after {seconds:.1f} s: {line}")

    def _name(self) -> str:
        return f"{self.kind} failed on rank {self.post.rank} of {self.post.size}, {self.nbytes:,} bytes"


class Ended(Work):
    """One that had nothing to do."""

    def __init__(self, post: Post, kind: str, result: Any = None):
        super().__init__(post, kind, 0)
        self.result = result

    def done(self) -> bool:
        return True

    def wait(self) -> Any:
        return self.result


class Single(Work):
    """One collective of torch.

    On NCCL `wait` makes the current stream wait and returns; `done` tells when the device has come so far.

    Arguments:
        finish: called by the first `wait` that finds it ended; what it returns is the result.
    """

    def __init__(self, post: Post, kind: str, nbytes: int, handle: Any, finish: Callable[[], Any] | None = None,
                 polled: bool = True):
        super().__init__(post, kind, nbytes)
        self.handle, self.finish, self.polled = handle, finish, polled
        self.result: Any = None

    def done(self) -> bool:
        return self.handle.is_completed()

    def _rest(self, seconds: float) -> bool:
        if not self.polled:
            self.handle.wait()
            return True
        try:
            self.handle.wait(timedelta(seconds=seconds))
        except RuntimeError:
            if not self.handle.is_completed():
                return False  # the slice is over
            self.handle.wait()  # raises again if it was no slice
        return True

    def _result(self) -> Any:
        if self.finish is not None:
            finish, self.finish = self.finish, None
            self.result = finish()
        return self.result


def flight_recorder() -> str:
    """Where torch keeps its record of collectives, if it was asked to."""
    size = os.environ.get("TORCH_FR_BUFFER_SIZE", os.environ.get("TORCH_NCCL_TRACE_BUFFER_SIZE", "0"))
    if not size.isdigit() or int(size) == 0:
        return ""
    path = os.environ.get("TORCH_FR_DUMP_TEMP_FILE", os.environ.get("TORCH_NCCL_DEBUG_INFO_TEMP_FILE"))
    where = f"in {path}<rank>" if path else "in the files that TORCH_FR_DUMP_TEMP_FILE names"
    return f"; torch's flight recorder is on: see its dumps {where}"
