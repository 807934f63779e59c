"""A trainer reduced to its saves, for tests that kill it. It imports no torch.

It says each thing in a line of JSON: what the lock was taken over from, what was left and is removed, which step it
goes on from (every byte of it compared), and each step as soon as its checkpoint is published.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from checkpointing import CHUNK, pieces, proven, save, values

from fasttrain.checkpoint.disk import Files
from fasttrain.checkpoint.files import (
    CheckpointError,
    Keep,
    Lock,
    Writer,
    clean,
    complete,
    leftovers,
    prune,
    publish,
    write_rank,
)

ROWS = 1000  # a third of a megabyte
KEEP = Keep(last=2)


def say(**what: Any) -> None:
    """One line, in one write: it is read whole or not at all."""
    os.write(1, json.dumps(what).encode() + b"\n")


class Dying(Files):
    """A disk at which the process is killed just before one operation."""

    def __init__(self, at: int):
        self._left = at

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("_") and callable(found):
            if self._left == 0:
                say(before=name)
                os.kill(os.getpid(), signal.SIGKILL)
            self._left -= 1
        return found


def train(directory: Path, how: str, files: Files | None = None, rows: int = ROWS, steps: int = 1000) -> None:
    """Go on from the newest checkpoint, and save every step.

    Arguments:
        how: "at once", or "in a thread".
    """
    files = Files() if files is None else files
    with Lock(directory) as lock:
        say(recovered=lock.recovered, left=[path.name for path in clean(lock)])
        found = complete(directory)
        step = proven(found[0].path, rows) if found else 0
        say(step=step, found=[(one.step, one.reason) for one in found])
        writer = Writer()
        for number in range(steps):
            def one(step: int = step + 1 + number) -> None:
                save(directory, step, files=files, attempt=str(os.getpid()), rows=rows)
                say(published=step)
                prune(directory, KEEP, files)

            if how == "at once":
                one()
            else:
                writer.submit(one)
        writer.wait()
    say(threads=threading.active_count(), torch="torch" in sys.modules)


def killed_at_random(directory: Path, how: str, kills: str) -> None:
    """Train, and be killed in the first save or the second; again and again. What is left each time is told too."""
    draw = random.Random(how)
    for _ in range(int(kills)):
        told, telling = os.pipe()
        if (child := os.fork()) == 0:
            os.dup2(telling, 1)
            os.close(telling)
            train(directory, how)
        os.close(telling)
        with open(told) as lines:
            for line in itertools.islice(lines, 2 + draw.randrange(2)):
                os.write(1, line.encode())
            time.sleep(draw.uniform(0, 0.06))
            os.kill(child, signal.SIGKILL)
            for line in lines:
                os.write(1, line.encode())
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        say(killed=[path.name for path in leftovers(directory)])


def in_ranks(directory: Path) -> None:
    """Three processes save together, four times; in the second and third save one of them is killed on the way."""
    for attempt, (victim, at) in enumerate([(None, 0), (1, 6), (2, 10), (None, 0)], 1):
        part, children = directory / f".part-{attempt}-x", []
        for rank in range(3):
            if (child := os.fork()) == 0:
                files = Dying(at) if rank == victim else Files()
                write_rank(part, rank, 3, pieces(attempt, rank, 3), values(attempt, rank), files=files, chunk=CHUNK)
                if rank == 0:
                    while any(not (part / f"rank-0000{other}-of-00003.json").exists() for other in {1, 2} - {victim}):
                        time.sleep(0.01)  # whom the deadline is not to hit
                    try:
                        say(published=publish(directory, part, attempt, 3, deadline_s=0.1).name)
                    except CheckpointError as error:
                        say(error=str(error))
                os._exit(0)
            children.append(child)
        say(ended=[os.waitpid(child, 0)[1] for child in children])


def die_everywhere(directory: Path) -> None:
    """Save, and be killed before the first operation; again, and be killed before the second; until none is left."""
    train(directory, "at once", rows=4, steps=3)
    at = 0
    while True:
        if (child := os.fork()) == 0:
            train(directory, "at once", Dying(at), rows=4, steps=1)
            os._exit(0)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            return
        at += 1
