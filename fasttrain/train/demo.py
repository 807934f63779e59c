"""``fasttrain demo``: a run that is killed while it saves, goes on, and ends in the bits of one that was not."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fasttrain.checkpoint.find import complete
from fasttrain.checkpoint.read import Reader
from fasttrain.train import checking, report, text
from fasttrain.train.config import BadInput, TrainConfig
from fasttrain.train.launch import RunFailed, launch

JOB = TrainConfig(steps=60, batch=8, sequence=64, layers=2, validate_every=1000, save_every=10, log_every=20, keep=3,
                  resume="auto")
TRIES = 5  # kills, should saves be over before they come


def demo(directory: Path | None, processes: int, say: Callable[[str], None] = print) -> bool:
    """Run the job twice, the second time with kills, and compare all that is kept.

    Arguments:
        directory: to be made, and kept; None: a temporary one.
        processes: of each run.
        say: takes what happens, line by line.

    Returns:
        Whether everything is equal.

    Raises:
        BadInput: the directory exists.
        RunFailed: a run ended that nobody killed.
    """
    with contextlib.ExitStack() as stack:
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fasttrain-demo-")))
        elif directory.exists():
            raise BadInput(f"--out {directory} exists; give a new directory")
        config = dataclasses.replace(JOB, processes=processes)
        checking.check(config)
        say(f"1. {config.steps} steps in {processes} processes, which nobody disturbs")
        whole = _begin(config, directory / "undisturbed")
        launch(whole, processes, config.threads)
        say("2. the same run, killed while it saves")
        killed = _begin(config, directory / "killed")
        _kill_in_a_save(killed, config, say)
        say("3. the same command again")
        launch(_begin(config, killed), processes, config.threads)
        return compare(whole, killed, say)


def compare(whole: Path, killed: Path, say: Callable[[str], None]) -> bool:
    """Whether the last checkpoints of two runs, and the losses of their logs, are equal; `say` is told how much was."""
    paths = [complete(run / "checkpoints")[0].path for run in (whole, killed)]
    with Reader(paths[0]) as one, Reader(paths[1]) as other:
        names, nbytes, different = sorted(one.tensors), 0, []
        if names != sorted(other.tensors):
            raise RuntimeError(f"{paths[0]} and {paths[1]} hold different tensors")
        for name in names:
            a, b = np.frombuffer(one.read(name), np.uint8), np.frombuffer(other.read(name), np.uint8)
            nbytes += len(a)
            if not np.array_equal(a, b):
                different.append(name)
    losses = [[(r["step"], r["loss"]) for r in report.read(run).train] for run in (whole, killed)]
    say(f"{len(names)} tensors of weights, optimizer and random generators, {nbytes:,} bytes: "
        + (f"DIFFERENT: {', '.join(different)}" if different else "identical, bit for bit"))
    say(f"{len(losses[0])} losses of the logs: " + ("identical" if losses[0] == losses[1] else "DIFFERENT"))
    return not different and losses[0] == losses[1]


def _begin(config: TrainConfig, out: Path) -> Path:
    config = dataclasses.replace(config, out=out)
    return report.begin(config, report.header(config, text.load(config.text, config.held_out, config.sequence)))


def _kill_in_a_save(run: Path, config: TrainConfig, say: Callable[[str], None]) -> None:
    """Run, and kill every process as soon as the second save begins; again, if the save was quicker."""
    for _ in range(TRIES):
        with _hunting(run, _newest(run)) as found:
            try:
                launch(run, config.processes, config.threads)
            except RunFailed:
                if not found:
                    raise
        if not found:
            raise RunFailed("the run came to its end before it could be killed")
        left = [path.name for path in (run / "checkpoints").glob(".part-*")]
        kept = [path.name for path in sorted((run / "checkpoints").glob("step-*"))]
        say(f"   killed {len(found)} processes by SIGKILL; complete: {', '.join(kept)}; "
            + (f"left unfinished: {', '.join(left)}" if left else "the save was over by then, so once more"))
        if left:
            return
    raise RunFailed(f"{TRIES} kills came after the save: this disk is too quick for them")


@contextlib.contextmanager
def _hunting(run: Path, newest: int) -> Iterator[list[int]]:
    """While it lasts, kill the processes of a run when it begins a save after one that is newer than this step's."""
    killed: list[int] = []
    over = threading.Event()

    def hunt() -> None:
        while not over.is_set():
            if any((run / "checkpoints").glob(".part-[0-9]*")) and _newest(run) > newest:
                for process in _processes(run):
                    os.kill(process, signal.SIGKILL)
                    killed.append(process)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=hunt, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def _newest(run: Path) -> int:
    """The step of the newest complete checkpoint; -1 if there is none."""
    return max((int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("step-*")), default=-1)


def _processes(run: Path) -> list[int]:
    """The ranks of a run, by what they were started with."""
    mark = ["-m", "fasttrain.train.rank", str(run.absolute())]
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended since
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            if words[-3:] == mark and "fasttrain.train.launch" not in words and "torchrun" not in words[:2]:
                found.append(int(folder.name))
    return found
