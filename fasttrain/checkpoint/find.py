"""Which checkpoints a directory holds, and why not the others: decided by manifests, never by names or clocks."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fasttrain.checkpoint import manifest
from fasttrain.checkpoint.errors import CheckpointError, Damaged, Incomplete, Malformed, NotACheckpoint
from fasttrain.checkpoint.manifest import need, take

STEP = re.compile(r"step-\d{12,}(-\d+)?")
LEFT = re.compile(r"\.(part|trash)-.+")


def step_name(step: int) -> str:
    """The name of a checkpoint's directory."""
    return f"step-{step:012}"


@dataclass(frozen=True)
class Found:
    """A checkpoint that was found.

    Attributes:
        path: its directory.
        step: of the training.
        sequence: its place in the order in which they were published; the largest is the newest.
        world: how many ranks wrote it.
        nbytes: of its data files.
        time: when it was published, by the clock of rank 0's machine, in ISO format.
        metrics: that it was published with.
        reason: why it cannot be used; None if nothing speaks against it. Where the manifest itself is the reason what
            it says is not known: step, sequence, world and nbytes are -1.
    """

    path: Path
    step: int = -1
    sequence: int = -1
    world: int = -1
    nbytes: int = -1
    time: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None


def candidates(directory: Path) -> list[Path]:
    """Every directory that has a checkpoint's name."""
    return _named(directory, STEP)


def leftovers(directory: Path) -> list[Path]:
    """What unfinished saves and removals have left."""
    return _named(directory, LEFT)


def _named(directory: Path, pattern: re.Pattern[str]) -> list[Path]:
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        return sorted(Path(entry.path) for entry in entries if pattern.fullmatch(entry.name))
    return []


def listed(directory: Path) -> list[Found]:
    """Every checkpoint in a directory, newest first, by its own manifest alone; unreadable ones are last."""
    found = []
    for path in candidates(Path(directory)):
        try:
            found.append(_told(path, peek(path)))
        except CheckpointError as error:
            found.append(Found(path, reason=str(error)))
    return sorted(found, key=lambda one: (one.sequence, one.path.name), reverse=True)


def complete(directory: str | os.PathLike[str]) -> list[Found]:
    """Every checkpoint in a directory, newest first; those that cannot be used carry the reason.

    It verifies manifests and sizes of files: tensors are verified when they are read, or by `verify`.
    """
    return [_examined(found) for found in listed(Path(directory))]


def newest(directory: str | os.PathLike[str]) -> Found | None:
    """The newest checkpoint that is complete, if there is one; older ones are not looked at."""
    return next((found for found in map(_examined, listed(Path(directory))) if found.reason is None), None)


def _examined(found: Found) -> Found:
    if found.reason is not None:
        return found
    try:
        told = peek(found.path)
        contents(found.path, told)
    except CheckpointError as error:
        return Found(**{**vars(found), "reason": str(error)})
    return found


def _told(path: Path, tree: dict[str, Any]) -> Found:
    return Found(path, tree["step"], tree["sequence"], tree["world"], time=tree["time"], metrics=tree["metrics"],
                 nbytes=sum(sum(entry["files"].values()) for entry in tree["ranks"]))


def peek(path: Path) -> dict[str, Any]:
    """A checkpoint's own manifest, checked.

    Raises:
        NotACheckpoint, Incomplete, Damaged: what is wrong with it.
    """
    file = path / manifest.NAME
    try:
        tree = manifest.decode(file, manifest.read_file(file))
    except Incomplete as error:
        why = f"has no {manifest.NAME}" if os.path.isdir(path) else "no directory"
        raise NotACheckpoint(f"{path}: {why}") from error
    world = take(file, tree, "world", int)
    take(file, tree, "step", int)
    for name, value in take(file, tree, "metrics", dict).items():
        need(file, type(value) is float, f"metric {name!r} is {str(value)[:100]!r}, no float")
    try:
        need(file, datetime.fromisoformat(take(file, tree, "time", str)).tzinfo is not None, "its time has no zone")
    except ValueError as error:
        raise Malformed(file, str(error)) from error
    need(file, take(file, tree, "sequence", int) >= 1, "its sequence is 0")
    ranks = take(file, tree, "ranks", list)
    need(file, len(ranks) == world >= 1, f"{len(ranks)} ranks are listed, {world} told")
    for rank, entry in enumerate(ranks):
        need(file, isinstance(entry, dict) and entry.get("file") == f"{manifest.stem(rank, world)}.json",
             f"its entry of rank {rank} makes no sense")
        take(file, entry, "size", int), manifest.checksum(file, entry.get("xxh3"))
        for number, name in enumerate(files := take(file, entry, "files", dict)):
            need(file, name == manifest.data_name(rank, world, number), f"{name!r} is no file of rank {rank}")
            take(file, files, name, int)
    return tree


def contents(path: Path, told: dict[str, Any]) -> list[bytes]:
    """What the manifests of all ranks hold; every file is there with its size, and no other.

    Arguments:
        told: by `peek`.

    Raises:
        Incomplete, Damaged: the first thing that is wrong.
    """
    for error in missing(path, told):
        raise error
    return [content(path, entry) for entry in told["ranks"]]


def content(path: Path, entry: dict[str, Any]) -> bytes:
    """What the manifest of one rank holds, if it is the one that the checkpoint's manifest names."""
    file = path / entry["file"]
    found = manifest.read_file(file)
    if len(found) != entry["size"] or manifest.digest(found) != entry["xxh3"]:
        raise Damaged(file, f"it is not the file that {manifest.NAME} names (xxh3 differs)")
    return found


def missing(path: Path, told: dict[str, Any]) -> Iterator[CheckpointError]:
    """Every file that is not there, not of its size, or not of this checkpoint."""
    sizes: dict[str, int] = {}
    for entry in told["ranks"]:
        sizes |= {entry["file"]: entry["size"], **entry["files"]}
    try:
        with os.scandir(path) as entries:
            there = {entry.name: entry.stat(follow_symlinks=False) for entry in entries
                     if not entry.name.startswith(".nfs")}  # NFS's own names of files that are still open
    except OSError as error:
        yield Damaged(path, f"cannot be read: {error.strerror}")
        return
    for name, size in sizes.items():
        if name not in there:
            yield Incomplete(f"{path / name}: not there")
        elif not stat.S_ISREG(there[name].st_mode):
            yield Malformed(path / name, "no plain file")
        elif there[name].st_size != size:
            yield Damaged(path / name, f"{there[name].st_size:,} bytes where {size:,} were written")
    for name in sorted(set(there) - set(sizes) - {manifest.NAME}):
        yield Malformed(path / name, "no manifest of this checkpoint names it; move it away if it is yours")
