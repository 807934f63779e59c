"""A pool of ranks for tests: processes forked from one that has torch loaded already.

A torchrun launch costs seconds, a pooled run of two ranks a tenth of one.

Example:
    def mean_rank(wire):
        return wire.mean_(torch.tensor([float(wire.rank)])).item()

    assert run(mean_rank, size=2) == [0.5, 0.5]
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
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
