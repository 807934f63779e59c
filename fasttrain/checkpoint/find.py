"""Which checkpoints a directory holds, and why not the others: decided by manifests, never by names or clocks."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasttrain.checkpoint import manifest
from fasttrain.checkpoint.errors import CheckpointError, Damaged, Incomplete, Malformed, NotACheckpoint

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
        time: when it was published, by the clock of rank 0's machine, in ISO format.
        metrics: that it was published with.
        reason: why it cannot be used; None if nothing speaks against it. What its manifest says is then not
            known, if the manifest is the reason: step and world are -1, and so is the sequence.
    """

    path: Path
    step: int = -1
    sequence: int = -1
    world: int = -1
    time: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None


def candidates(directory: Path) -> list[Path]:
    """Every directory that has a checkpoint's name."""
    try:
        with os.scandir(directory) as entries:
            return sorted(Path(entry.path) for entry in entries if STEP.fullmatch(entry.name))
    except FileNotFoundError:
        return []


def leftovers(directory: Path) -> list[Path]:
    """What unfinished saves and removals have left."""
    try:
        with os.scandir(directory) as entries:
            return sorted(Path(entry.path) for entry in entries if LEFT.fullmatch(entry.name))
    except FileNotFoundError:
        return []


def complete(directory: Path) -> list[Found]:
    """Every checkpoint in a directory, newest first; those that cannot be used carry the reason.

    It reads manifests and sizes of files: tensors are verified when they are read, or by `verify`.
    """
    found = []
    for path in candidates(Path(directory)):
        told: dict[str, Any] = {}
        reason = None
        try:
            told = peek(path)
            ranks(path, told)
        except CheckpointError as error:
            reason = str(error)
        found.append(Found(path, reason=reason, **{key: told[key] for key in
                                                   ("step", "sequence", "world", "time", "metrics") if key in told}))
    return sorted(found, key=lambda one: (one.sequence, one.path.name), reverse=True)


def peek(path: Path) -> dict[str, Any]:
    """A checkpoint's own manifest, checked.

    Raises:
        NotACheckpoint, Incomplete, Damaged: what is wrong with it.
    """
    if not path.is_dir():
        raise NotACheckpoint(f"{path}: no directory of a checkpoint")
    file = path / manifest.NAME
    if not os.path.lexists(file):
        raise NotACheckpoint(f"{path}: has no {manifest.NAME}")
    tree = manifest.decode(file, manifest.read_file(file))
    manifest.check_format(file, tree)
    step, sequence, world, ranks, metrics = (tree.get(key) for key in ("step", "sequence", "world", "ranks", "metrics"))
    for name, value, least in (("step", step, 0), ("sequence", sequence, 1), ("world", world, 1)):
        if type(value) is not int or value < least:
            raise Malformed(file, f"{name} is {value!r}")
    if not isinstance(tree.get("time"), str) or not isinstance(metrics, dict):
        raise Malformed(file, "time or metrics are missing")
    if (not isinstance(ranks, list) or len(ranks) != world
            or any(not isinstance(entry, dict) or entry.get("file") != f"{manifest.stem(rank, world)}.json"
                   for rank, entry in enumerate(ranks))):
        raise Malformed(file, f"its ranks are not the {world} that it tells")
    return tree


def ranks(path: Path, told: dict[str, Any]) -> list[manifest.RankManifest]:
    """All ranks' manifests of a checkpoint, and that every file is there with its size and no other.

    Arguments:
        told: by `peek`.
    """
    read = []
    sizes = {manifest.NAME: -1}
    for rank, entry in enumerate(told["ranks"]):
        file = path / entry["file"]
        content = manifest.read_file(file)
        if len(content) != entry.get("size") or manifest.digest(content) != entry.get("xxh3"):
            raise Damaged(file, f"it is not the file that {manifest.NAME} names")
        read.append(manifest.read_rank(file, content, rank, told["world"]))
        sizes |= {file.name: -1} | {name: one["size"] for name, one in read[-1].files.items()}
    with os.scandir(path) as entries:
        there = {entry.name: entry.stat(follow_symlinks=False) for entry in entries
                 if not entry.name.startswith(".nfs")}  # NFS's own names of files that are still open
    for name, size in sizes.items():
        if name not in there:
            raise Incomplete(f"{path / name}: not there")
        if not stat.S_ISREG(there[name].st_mode):
            raise Malformed(path / name, "no plain file")
        if size >= 0 and there[name].st_size != size:
            raise Damaged(path / name, f"{there[name].st_size:,} bytes where {size:,} were written")
    if extra := sorted(set(there) - set(sizes)):
        raise Malformed(path / extra[0], "no manifest of this checkpoint names it; move it away if it is yours")
    return read
