"""Processes that share a wire, for benchmarks: one thread each, on this machine, over gloo."""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fasttrain.dist.wire import Wire


def together(work: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """Call ``work(wire, *arguments)``, a function of a module, in `size` processes; their answers in rank order."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_one, args=(theirs, folder, rank, size, work, arguments), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return [pipe.recv() for pipe in pipes]  # EOFError: that one failed, and has printed why
        finally:
            for process in processes:
                process.kill()
                process.join()


def slowest(seconds: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Of each rival in each round, the time of the rank that took longest."""
    return {name: [max(times) for times in zip(*(rank[name] for rank in seconds), strict=True)] for name in seconds[0]}


def _one(pipe: Any, folder: str, rank: int, size: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    wire = Wire(torch.device("cpu"), 60, store=dist.FileStore(str(Path(folder, "store")), size), rank=rank,
                world_size=size)
    pipe.send(work(wire, *arguments))
    threading.Event().wait()  # to be killed when all have answered: a connection closed early fails a slower one
