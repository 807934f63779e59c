"""How the parts of all ranks become one checkpoint: without collectives, and all at once."""

from __future__ import annotations

import math
import operator
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, SupportsIndex

from fasttrain.checkpoint import manifest
from fasttrain.checkpoint.disk import DISK, Files, empty, write_whole
from fasttrain.checkpoint.errors import Damaged, Incomplete
from fasttrain.checkpoint.find import listed, step_name
from fasttrain.checkpoint.regions import Region
from fasttrain.checkpoint.space import room

POLL_S = 0.01, 0.25  # first and longest


def checked(step: Any, metrics: Mapping[str, Any] | None) -> tuple[int, dict[str, float]]:
    """A step and metrics as a manifest has them; numpy's numbers and tensors of one element are numbers too.

    Raises:
        ValueError, TypeError: they are none.
    """
    if isinstance(step, bool) or not isinstance(step, SupportsIndex) or operator.index(step) < 0:
        raise ValueError(f"step must be a non-negative integer, not {step!r}")
    measured = {}
    for name, value in (metrics or {}).items():
        try:
            number = value.item() if callable(getattr(value, "item", None)) else value
            if not isinstance(number, int | float):
                raise TypeError(f"a {type(number).__name__}")
            measured[str(name)] = float(number)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(f"metrics are numbers, which retention compares; {name!r} is {value!r}") from error
    return operator.index(step), measured


def publish(directory: Path, part: Path, step: int, world: int, *, deadline_s: float = 600.0,
            metrics: Mapping[str, float] | None = None, waiting: Callable[[list[int]], None] | None = None,
            whole: bool = False, files: Files = DISK) -> Path:
    """Make one checkpoint of what all ranks have written; for rank 0, after its own `write_rank`.

    It waits for the manifest of every rank, checks each, writes the one that names them all, and gives the directory
    its name. Each step is durable before the next.

    Arguments:
        directory: of all checkpoints.
        part: what the ranks wrote into; it lies in `directory`.
        step: of the training.
        deadline_s: how long to wait for the other ranks.
        metrics: what retention may choose by.
        waiting: called now and then with the ranks that are still waited for; it may raise to stop.
        whole: refuse tensors of which the ranks have written fewer elements than they have, or more.

    Returns:
        The checkpoint's own directory.

    Raises:
        Incomplete: ranks have not written theirs in time, or not all of a tensor. Nothing is published.
        Damaged: a rank's manifest does not agree with itself, or a file of its has not the size it tells.
        NoSpace, OSError: the disk's error. What all ranks have written is removed, unless it was published already.
    """
    step, measured = checked(step, metrics)
    directory = Path(directory)
    ranks, tensors = _wait(part, world, deadline_s, waiting)
    if whole:
        _check_whole(part, tensors)
    before = listed(directory)
    # One for each that cannot be read: what cannot be read now may be read later, and must not be newer then.
    sequence = 1 + max((found.sequence for found in before if found.sequence > 0), default=0)
    sequence += sum(found.sequence < 0 for found in before)
    content = {"format": manifest.FORMAT, "producer": manifest.PRODUCER, "step": step, "sequence": sequence,
               "world": world, "time": datetime.now(UTC).isoformat(timespec="seconds"), "metrics": measured,
               "ranks": ranks}
    path = directory / step_name(step)
    if os.path.lexists(path):  # of a run that went back, or a damaged one
        path = directory / f"{step_name(step)}-{sequence}"
    with room(directory, sum(sum(entry["files"].values()) for entry in ranks)):
        try:
            write_whole(part / manifest.NAME, manifest.encode(content), files)
            files.sync_directory(part)
            files.rename(part, path)
        except OSError:
            with suppress(OSError):
                empty(part, files)
            raise
    files.sync_directory(directory)
    return path


def _wait(part: Path, world: int, deadline_s: float,
          waiting: Callable[[list[int]], None] | None) -> tuple[list[dict], dict[str, list[Region]]]:
    """Entries of all ranks' manifests, as soon as they are there; and what they hold of each tensor."""
    end = time.monotonic() + deadline_s
    pause, longest = POLL_S
    found: dict[int, dict] = {}
    tensors: dict[str, list[Region]] = {}
    while True:
        for rank in range(world):
            if rank not in found:
                with suppress(Incomplete):
                    found[rank] = _rank(part, rank, world, tensors)
        missing = [rank for rank in range(world) if rank not in found]
        if not missing:
            return [found[rank] for rank in range(world)], tensors
        if time.monotonic() > end:
            raise Incomplete(f"{part}: within {deadline_s:g} s nothing came from rank{'s' * (len(missing) > 1)} "
                             f"{', '.join(map(str, missing[:20]))} of {world}; nothing was published")
        if waiting is not None:
            waiting(missing)
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _check_whole(part: Path, tensors: Mapping[str, list[Region]]) -> None:
    for name, regions in tensors.items():
        held, whole = sum(region.elements for region in regions), math.prod(regions[0].shape)
        if held != whole:
            raise Incomplete(f"{part}: tensor {name!r}: the ranks have written {held:,} elements of {whole:,}; nothing "
                             "was published: have all of them save the same state, and give the Checkpointer the mesh "
                             "of what is cut or lies in stages")


def _rank(part: Path, rank: int, world: int, tensors: dict[str, list[Region]]) -> dict:
    """The entry of one rank in the checkpoint's manifest; what it holds goes to `tensors`."""
    path = part / f"{manifest.stem(rank, world)}.json"
    content = manifest.read_file(path)
    read = manifest.read_rank(path, content, rank, world)
    for name, file in read.files.items():
        size = (part / name).stat().st_size
        if size != file.size:
            raise Damaged(part / name, f"{size:,} bytes where {file.size:,} were written")
    for name, _, piece in read.tensors:
        tensors.setdefault(name, []).append(piece.region)
    return {"file": path.name, "size": len(content), "xxh3": manifest.digest(content),
            "files": {name: file.size for name, file in read.files.items()}}
