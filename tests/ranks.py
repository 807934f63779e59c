"""A pool of ranks for tests: processes forked from one that has torch loaded already.

A torchrun launch costs seconds, a pooled run of two ranks a tenth of one.

Example:
    def mean_rank(wire):
        return wire.mean_(torch.tensor([float(wire.rank)])).item()

    assert run(mean_rank, size=2) == [0.5, 0.5]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from forks import context

PATIENCE_S = 60


class RankFailed(AssertionError):
    """A rank raised, or ended without an answer."""


def run(work: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """Call ``work(wire, *arguments)`` on `size` ranks, one thread each, and return their answers in the order of ranks.

    `work` is a function of a test module, and everything that goes in or out is pickled.

    Raises:
        RankFailed: with the traceback of a rank that raised, one that lost no peer if there is one: a rank that
            raises closes its connections, and its peers fail of that, perhaps sooner. The others are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(theirs, rank, size, str(Path(folder, "store")), work,
                                                          arguments), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            answers = [_answer(rank, pipe) for rank, pipe in enumerate(pipes)]
        finally:
            for process in processes:
                process.kill()
                process.join()
    failed = sorted((answer for answer in answers if answer.failure), key=lambda answer: answer.lost_a_peer)
    if failed:
        raise RankFailed(failed[0].failure)
    return [answer.value for answer in answers]


class _Answer(NamedTuple):
    value: Any = None
    failure: str | None = None
    lost_a_peer: bool = False


def _answer(rank: int, pipe: Any) -> _Answer:
    if not pipe.poll(PATIENCE_S):
        return _Answer(failure=f"rank {rank} gave no answer in {PATIENCE_S} s", lost_a_peer=True)
    try:
        return pipe.recv()
    except EOFError:
        return _Answer(failure=f"rank {rank} ended without an answer")


def _rank(pipe: Any, rank: int, size: int, store: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    from fasttrain.dist.wire import Wire, WireError

    torch.set_num_threads(1)
    try:
        meeting = dist.FileStore(store, size)
        meeting.set_timeout(timedelta(seconds=PATIENCE_S))
        wire = Wire(torch.device("cpu"), timeout_s=PATIENCE_S / 2, store=meeting, rank=rank, world_size=size)
        answer = _Answer(work(wire, *arguments))
    except BaseException as error:
        answer = _Answer(failure=f"rank {rank} failed:\n{traceback.format_exc()}",
                         lost_a_peer=isinstance(error, WireError))
    pipe.send(answer)
    if not answer.failure:
        pipe.poll(None)  # stay until every rank has answered: a connection closed early fails a slower peer


# --- Ranks that fail --------------------------------------------------------------------------------------------------

class Ended(NamedTuple):
    """How a rank ended: its exit code (None: it did not, and was killed), what it wrote to standard error, and when.

    Times are those of `time.monotonic`, which all processes of a machine share.
    """

    code: int | None
    text: str
    at: float


def faulty(work: Callable[..., Any], size: int, *arguments: Any, timeout_s: float = 30, grace_s: float = 1.0,
           stopped: bool = False) -> list[Ended]:
    """Call ``work(wire, watcher, *arguments)`` on `size` ranks that may fail, and say how each ended.

    An exception that leaves `work` reaches `sys.excepthook`, as that of a program does.

    Arguments:
        timeout_s: of the wire. grace_s: of the watcher.
        stopped: one rank does not end by itself; it is killed when the others have ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_faulty, args=(folder, rank, size, work, arguments, timeout_s, grace_s),
                                     daemon=True) for rank in range(size)]
        for process in processes:
            process.start()
        ended: dict[int, Ended] = {}
        end = time.monotonic() + PATIENCE_S
        try:
            while len(ended) < size - stopped and time.monotonic() < end:
                wait([p.sentinel for rank, p in enumerate(processes) if rank not in ended], end - time.monotonic())
                for rank, process in enumerate(processes):
                    if rank not in ended and process.exitcode is not None:
                        ended[rank] = Ended(process.exitcode, Path(folder, str(rank)).read_text(), time.monotonic())
        finally:
            for process in processes:
                process.kill()
                process.join()
        for rank in range(size):
            ended.setdefault(rank, Ended(None, Path(folder, str(rank)).read_text(), time.monotonic()))
    return [ended[rank] for rank in range(size)]


def mark(word: str) -> None:
    """Write a word and the time to standard error, for `times`."""
    os.write(2, f"{word} {time.monotonic()}\n".encode())


def times(word: str, ended: list[Ended]) -> list[float]:
    """When ranks wrote the word."""
    lines = [line.split() for rank in ended for line in rank.text.splitlines()]
    return [float(line[1]) for line in lines if line[:1] == [word]]


def _faulty(folder: str, rank: int, size: int, work: Callable[..., Any], arguments: tuple[Any, ...], timeout_s: float,
            grace_s: float) -> None:
    import torch
    import torch.distributed as dist

    from fasttrain.dist.watcher import Watcher
    from fasttrain.dist.wire import Wire

    torch.set_num_threads(1)
    file = os.open(Path(folder, str(rank)), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    wire = Wire(torch.device("cpu"), timeout_s, store=dist.FileStore(str(Path(folder, "store")), size), rank=rank,
                world_size=size)
    wire.watch = watcher = Watcher(grace_s)
    try:
        work(wire, watcher, *arguments)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    watcher.close()
