"""How checkpoints are removed: so that half of one is never taken for a whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from fasttrain.checkpoint import find
from fasttrain.checkpoint.disk import DISK, Files, empty
from fasttrain.checkpoint.lock import Lock
from fasttrain.checkpoint.retention import Keep


def prune(directory: str | os.PathLike[str], keep: Keep, files: Files = DISK) -> list[Path]:
    """Remove the complete checkpoints that `keep` does not name; for the holder of the directory's lock.

    What cannot be read, or is not complete, is not touched: somebody may want to know why.

    Returns:
        What was removed.
    """
    directory = Path(directory)
    # By manifests and sizes of files: among hundreds that are kept for ever no other is read.
    usable = [found for found in find.listed(directory) if found.reason is None
              and not any(find.missing(found.path, find.peek(found.path)))]
    kept = {*keep.chosen(usable), *(found.path for found in [find.newest(directory)] if found is not None)}
    removed = [found.path for found in usable if found.path not in kept]
    remove(directory, removed, files)
    return removed


def clean(lock: Lock, files: Files = DISK) -> list[Path]:
    """Remove what unfinished saves and removals of an earlier process have left; before the first save.

    Arguments:
        lock: of the directory; held.

    Returns:
        What was removed, to be told.
    """
    if not lock.held:
        raise ValueError(f"{lock.directory}: the lock is not held: what is unfinished may be another process's work")
    left = find.leftovers(lock.directory)
    for path in left:
        empty(path, files)
    if left:
        files.sync_directory(lock.directory)
    return left


def remove(directory: Path, paths: Sequence[Path], files: Files = DISK) -> None:
    """Remove directories within `directory`: first, durably, their names: no half of one is ever taken for it."""
    trash = []
    for path in paths:
        names = (directory / f".trash-{path.name.lstrip('.')}{f'-{number}' if number else ''}" for number in count())
        trash.append(next(name for name in names if not os.path.lexists(name)))
        files.rename(path, trash[-1])
    if trash:
        files.sync_directory(directory)
    for path in trash:
        empty(path, files)
