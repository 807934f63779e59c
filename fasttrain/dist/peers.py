"""What one process knows of the others: their processes, if they run on this machine, and what they said last."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple


class Identity(NamedTuple):
    """A process, in a way that another on the same machine recognises.

    Example:
        >>> Identity.own().state()
        'running'
    """

    machine: str
    pid: int
    started: str

    @classmethod
    def own(cls) -> Identity:
        """That of this process. Another container is another machine."""
        return cls(_machine(), os.getpid(), _stat(os.getpid())[1])

    def state(self) -> str | None:
        """"running", "stopped" or "gone"; None where it cannot be seen from here."""
        if not self.machine or self.machine != _machine():
            return None
        state, started = _stat(self.pid)
        if state in ("", "Z", "X") or started != self.started:
            return "gone"
        return "stopped" if state in ("T", "t") else "running"


@functools.cache
def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}" if boot.exists() else ""


def _stat(pid: int) -> tuple[str, str]:
    """The state of a process and when it was started; nothing if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


class Operation(NamedTuple):
    """A collective that a rank has issued: of which group, the how many-th, what, and on how many bytes."""

    wire: str
    number: int
    kind: str
    nbytes: int

    def __str__(self) -> str:
        return f"{self.kind} of {self.nbytes:,} bytes" if self.nbytes else self.kind


class Said(NamedTuple):
    """A heartbeat: its number, the training step, the last collectives, whether it is the last one, and what keeps the
    rank from going on, if it knows.

    Example:
        >>> said = Said(3, None, (Operation("all", 1, "broadcast", 64),))
        >>> Said.from_json(said.to_json()) == said
        True
    """

    beat: int
    step: int | None
    operations: tuple[Operation, ...]
    left: bool = False
    trouble: str = ""

    def to_json(self) -> str:
        return json.dumps(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> Said:
        beat, step, operations, left, trouble = json.loads(text)
        return cls(beat, step, tuple(Operation(*o) for o in operations), left, trouble)

    def __str__(self) -> str:
        last = self.operations[-1] if self.operations else None
        return (f"was last at {f'collective {last.number}, {last}' if last else 'no collective'}"
                f"{'' if self.step is None else f', in step {self.step}'}")


class Heard:
    """The last heartbeat of each peer, and for how long it has been seen not to change."""

    def __init__(self) -> None:
        self.said: dict[int, Said] = {}
        self._seen: dict[int, tuple[float, float]] = {}  # first and last time that it was read as it is

    def hear(self, rank: int, said: Said) -> None:
        """Take a heartbeat that has been read just now."""
        now = time.monotonic()
        changed = rank not in self.said or self.said[rank].beat != said.beat
        self._seen[rank] = (now if changed else self._seen[rank][0], now)
        self.said[rank] = said

    def quiet(self, rank: int) -> float:
        """Seconds for which the rank has been seen to say nothing new."""
        first, last = self._seen.get(rank, (0.0, 0.0))
        return last - first

    def __str__(self) -> str:
        return "".join(f"; rank {rank} {said}" for rank, said in sorted(self.said.copy().items()))


def disagreement(told: Mapping[int, Iterable[Operation]]) -> str | None:
    """Where ranks have issued different collectives under one number, in words; None if they have not.

    Example:
        >>> disagreement({0: [Operation("all", 7, "all_reduce", 64)], 1: [Operation("all", 7, "broadcast", 64)]})
        'collective 7 is all_reduce of 64 bytes on rank 0 and broadcast of 64 bytes on rank 1'
    """
    first: dict[tuple[str, int], tuple[int, Operation]] = {}
    found: list[tuple[int, str]] = []
    for rank, operations in sorted(told.items()):
        for operation in operations:
            other, before = first.setdefault(operation[:2], (rank, operation))
            if before != operation:
                found.append((operation.number, f"collective {operation.number} is {before} on rank {other} and "
                                                f"{operation} on rank {rank}"))
    return min(found)[1] if found else None
