"""A pool of ranks for tests: processes forked from one that has torch loaded already.

A torchrun launch costs seconds, a pooled run of two ranks a tenth of one. Workers come from a fork server, never from
the test process, whose threads a fork would not survive.

Example:
    def mean_rank(wire):
        return wire.mean_(torch.tensor([float(wire.rank)])).item()

    assert run(mean_rank, size=2) == [0.5, 0.5]
"""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

PATIENCE_S = 60

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "fasttrain.parallel.data", "fasttrain.train.loop",
                                 "fasttrain.train.recipe"])


class RankFailed(AssertionError):
    """A rank raised, or ended without an answer."""


def run(work: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """Call ``work(wire, *arguments)`` on `size` ranks, one thread each, and return their answers in the order of ranks.

    `work` is a function of a test module, and everything that goes in or out is pickled.

    Raises:
        RankFailed: with the traceback of the first rank that raised. The others are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = _context.Pipe()
            process = _context.Process(target=_rank, args=(theirs, rank, size, str(Path(folder, "store")), work,
                                                           arguments), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return [_answer(rank, pipe) for rank, pipe in enumerate(pipes)]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _answer(rank: int, pipe: Any) -> Any:
    if not pipe.poll(PATIENCE_S):
        raise RankFailed(f"rank {rank} gave no answer in {PATIENCE_S} s")
    try:
        good, value = pipe.recv()
    except EOFError:
        raise RankFailed(f"rank {rank} ended without an answer") from None
    if not good:
        raise RankFailed(f"rank {rank} failed:\n{value}")
    return value


def _rank(pipe: Any, rank: int, size: int, store: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    from fasttrain.dist.wire import Wire

    torch.set_num_threads(1)
    try:
        meeting = dist.FileStore(store, size)
        meeting.set_timeout(timedelta(seconds=PATIENCE_S))
        wire = Wire(torch.device("cpu"), timeout_s=PATIENCE_S / 2, store=meeting, rank=rank, world_size=size)
        answer = (True, work(wire, *arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send(answer)
    if answer[0]:
        pipe.poll(None)  # stay until every rank has answered: a connection closed early fails a slower peer
