"""Everything in a checkpoint compared with its checksums, and everything that is wrong named."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fasttrain.checkpoint import find, header, manifest, mapped
from fasttrain.checkpoint.errors import CheckpointError, Damaged, Incomplete, NotACheckpoint
from fasttrain.checkpoint.regions import Region, tiling


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong: in which file, of which tensor (None: of none), and what."""

    file: Path
    tensor: str | None
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {f'tensor {self.tensor!r}: ' if self.tensor is not None else ''}{self.what}"


def verify(directory: str | os.PathLike[str], progress: Callable[[Path], None] | None = None) -> list[Damage]:
    """Verify every byte of a checkpoint, or of all in a directory.

    Arguments:
        directory: ``DIRECTORY/step-...``, or ``DIRECTORY``.
        progress: told each checkpoint before it is read.

    Returns:
        What is damaged; nothing if all is as it was written.

    Raises:
        NotACheckpoint: there is none.
    """
    found: list[Damage] = []
    for path in checkpoints(Path(directory)):
        if progress is not None:
            progress(path)
        found += _damages(path)
    return found


def checkpoints(path: Path) -> list[Path]:
    """A checkpoint itself, or all in a directory of them, complete or not.

    Raises:
        NotACheckpoint: there is none.
    """
    if os.path.lexists(path / manifest.NAME) or find.STEP.fullmatch(path.name):
        return [path]
    if not (paths := find.candidates(path)):
        raise NotACheckpoint(f"{path}: {'holds no checkpoint' if path.is_dir() else 'no directory'}")
    return paths


def _damages(path: Path) -> Iterator[Damage]:
    """All that is wrong with one checkpoint: each rank is looked at, whatever is wrong with the others."""
    try:
        told = find.peek(path)
    except CheckpointError as error:
        yield _damage(error)
        return
    yield from map(_damage, find.missing(path, told))
    regions: dict[tuple[str, str, tuple[int, ...]], list[Region]] = {}
    all_read = True
    for rank, entry in enumerate(told["ranks"]):
        file = path / entry["file"]
        try:
            read = manifest.read_rank(file, find.content(path, entry), rank, told["world"])
        except Incomplete:  # it is among the missing
            all_read = False
            continue
        except CheckpointError as error:
            all_read = False
            yield _damage(error)
            continue
        for name, dtype, part in read.tensors:
            regions.setdefault((name, dtype, part.region.shape), []).append(part.region)
        for name, told_of in read.files.items():
            yield from _data(path / name, told_of, [(tensor, part) for tensor, _, part in read.tensors
                                                    if part.file == name])
    if all_read:
        for (name, *_), parts in regions.items():
            if (words := tiling(parts)) is not None:
                yield Damage(path, name, words)


def _data(file: Path, told: manifest.DataFile, parts: list[tuple[str, manifest.Part]]) -> Iterator[Damage]:
    """What is wrong within one data file."""
    try:
        view = mapped.map_file(file)
    except Incomplete:
        return
    except CheckpointError as error:
        yield _damage(error)
        return
    try:
        mapped.check_header(file, view, told)
        if len(view) == told.size:
            header.read(file, view)
    except CheckpointError as error:
        yield _damage(error)
    for tensor, part in parts:
        if part.offset + part.nbytes > len(view):
            yield Damage(file, tensor, f"cut off: {max(0, len(view) - part.offset):,} of {part.nbytes:,} bytes "
                                       f"are left")
        elif bad := [index for index in range(len(part.chunks)) if not mapped.is_good(view, part, index)]:
            low, high = mapped.chunk_of(part, bad[0])[0], mapped.chunk_of(part, bad[-1])[1]
            yield Damage(file, tensor, f"bytes {low:,} to {high:,} of {part.nbytes:,} are not those that were written "
                                       f"(xxh3 differs in {len(bad)} of {len(part.chunks)} chunks)")
    mapped.unmap(view)


def _damage(error: CheckpointError) -> Damage:
    if isinstance(error, Damaged):
        return Damage(error.file, error.tensor, error.what)
    file, _, what = str(error).partition(": ")
    return Damage(Path(file), None, what)
