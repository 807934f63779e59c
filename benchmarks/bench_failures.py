"""How long after one rank's failure the other raises, and what it says: ours, and torch's DistributedDataParallel."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fasttrain.dist.failures import first_words
from fasttrain.dist.watcher import Watcher
from fasttrain.dist.wire import Wire
from fasttrain.parallel import DataParallel

TIMEOUT_S, ROUNDS = 5.0, 3
CULPRIT, STEPS = 1, 3


def exits() -> None:
    raise ValueError("the batch is bad")


def lives_on() -> None:
    with contextlib.suppress(ValueError):
        exits()
    time.sleep(60)


def in_backward() -> None:
    """Raised by autograd, once one gradient has come."""


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS: dict[str, Callable[[], None]] = {"an exception that ends it": exits, "an exception, caught": lives_on,
                                         "an exception in backward, caught": in_backward,
                                         "SIGKILL": is_killed, "SIGSTOP": is_stopped}


def ours(fault: Callable[[], None], rank: int, **place: Any) -> None:
    """Steps that are guarded, on a wire."""
    wire = Wire(torch.device("cpu"), TIMEOUT_S, rank=rank, **place)
    wire.watch = watcher = Watcher()
    if fault is in_backward:
        steps(DataParallel(two_layers(), mesh=wire), rank)
    with contextlib.suppress(ValueError):
        for step in range(STEPS):
            watcher.step = step
            with watcher.guard():
                if rank == CULPRIT and step == STEPS - 1:
                    ready()
                    exits() if fault is lives_on else fault()
                told(lambda: wire.sum_(torch.ones(1000)))
    time.sleep(60)


def torchs(fault: Callable[[], None], rank: int, timeout: Any, **place: Any) -> None:
    """The same steps with DDP."""
    dist.init_process_group("gloo", rank=rank, timeout=timeout, **place)
    if fault is in_backward:
        steps(torch.nn.parallel.DistributedDataParallel(two_layers()), rank)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(30, 30))
    for step in range(STEPS):
        loss = model(torch.ones(1, 30)).sum()
        if rank == CULPRIT and step == STEPS - 1:
            ready()
            fault()
        told(loss.backward)


def two_layers() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(30, 30), torch.nn.Linear(30, 30))


def steps(model: Any, rank: int) -> None:
    """In the last of them one rank catches what a hook in its backward pass raises, and lives on."""
    def fail(grad: torch.Tensor) -> None:
        ready()
        exits()

    def between(layer: Any, inputs: Any, out: torch.Tensor) -> None:
        out.register_hook(fail)

    for step in range(STEPS):
        if rank == CULPRIT and step == STEPS - 1:
            model.module[0].register_forward_hook(between)
        loss = model(torch.ones(1, 30)).sum()
        with contextlib.suppress(ValueError):
            told(loss.backward)
    time.sleep(60)


def ready() -> None:
    """The other waits by now; note the time."""
    time.sleep(0.7)
    note("")


def told(work: Callable[[], Any]) -> None:
    """Note when and how it fails."""
    try:
        work()
    except RuntimeError as error:
        note(first_words(error))
        raise


def note(words: str) -> None:
    Path(os.environ["NOTE"]).write_text(f"{time.monotonic()} {words}")


def _one(folder: str, whose: str, name: str, rank: int) -> None:
    os.environ["NOTE"] = str(Path(folder, str(rank)))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    place: dict[str, Any] = {"store": dist.FileStore(str(Path(folder, "store")), 2), "rank": rank, "world_size": 2}
    if whose == "fasttrain":
        ours(FAULTS[name], **place)
    else:
        torchs(FAULTS[name], timeout=timedelta(seconds=TIMEOUT_S), **place)


def once(whose: str, name: str) -> tuple[float, str]:
    """Seconds from the failure of one to the error of the other, and what it says."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_one, args=(folder, whose, name, rank), daemon=True) for rank in range(2)]
        for process in processes:
            process.start()
        end = time.monotonic() + 60
        files = [Path(folder, str(rank)) for rank in range(2)]
        while not all(file.exists() and file.read_text() for file in files) and time.monotonic() < end:
            time.sleep(0.05)
        for process in processes:
            process.kill()
            process.join()
        fault, error = files[CULPRIT].read_text(), files[0].read_text()
    at, _, words = error.partition(" ")
    return float(at) - float(fault), words


def run(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Every fault, both packages, one after the other."""
    rows = []
    for name in FAULTS:
        for whose in ("fasttrain", "DDP"):
            found = [once(whose, name) for _ in range(rounds)]
            words = found[0][1]
            rows.append({"fault": name, "whose": whose, "timeout": TIMEOUT_S, "words": words,
                         "seconds": statistics.median(seconds for seconds, _ in found),
                         "longest": max(seconds for seconds, _ in found), "names_rank": f"rank {CULPRIT}" in words})
    return rows


def report(figures: list[dict[str, Any]]) -> str:
    """The table of the figures."""
    return "\n".join(f"{row['fault']:31} {row['whose']:10} {row['seconds']:5.2f} s  {row['words'][:110]}"
                     for row in figures)
