"""What a failure is called, with what code a process ends, and how it ends without waiting for anybody."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

from fasttrain.dist.work import WireError

FAILED = 70  # exit code of the rank that failed
PEER_FAILED = 71  # and of those that ended because it did
INTERRUPTED = 130  # as shells have it for SIGINT


class PeerFailed(WireError):
    """A rank failed, and this one cannot go on.

    Attributes:
        rank: among all processes.
        cause: what it said of itself, or what was seen of it.
        step: the training step in which it was, if it told.
    """

    def __init__(self, rank: int, cause: str, step: int | None = None):
        super().__init__(f"rank {rank} failed{'' if step is None else f' in step {step}'}: {cause}")
        self.rank, self.cause, self.step = rank, cause, step

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rank, self.cause, self.step)


def first_words(error: BaseException | str) -> str:
    """An error in one line."""
    if isinstance(error, str):
        return error
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def end_process(code: int) -> None:
    """``os._exit`` with what has been printed, unless somebody who hangs holds the stream."""
    def flush() -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    flushing = threading.Thread(target=flush, daemon=True)
    flushing.start()
    flushing.join(0.3)
    os._exit(code)


def is_about_a_connection(error: RuntimeError) -> bool:
    """Whether an error of torch's collectives only says that a peer is gone or silent."""
    torchs = any(kind.__name__ == "DistError" for kind in type(error).__mro__)  # by name: torch need not be loaded here
    return torchs or any(
        word in str(error) for word in ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out waiting"))
