"""Whether a checkpoint can be written at all: asked at the start, not after the first hours."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fasttrain.checkpoint.disk import DISK, Files, make_directories
from fasttrain.checkpoint.errors import CheckpointError, NoSpace

FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write there."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


@contextmanager
def room(directory: Path, needed: int) -> Iterator[None]:
    """Say what was needed and what was free, where something within fails because the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise NoSpace(directory, needed, free_bytes(directory), f"writing failed ({error.strerror})") from error
        raise


def preflight(directory: str | os.PathLike[str], needed: int, files: Files = DISK) -> int:
    """Make the directory, write into it, and compare what a checkpoint needs with what is free.

    Arguments:
        needed: bytes of one checkpoint; old ones are removed only when a new one is complete.

    Returns:
        Bytes that are free.

    Raises:
        NoSpace: there are fewer.
        CheckpointError: the directory cannot be made or written into.
    """
    directory = Path(directory)
    probe = directory / f".part-probe-{os.getpid()}"
    try:
        make_directories(directory, files)
        with suppress(FileNotFoundError):
            files.unlink(probe)
        file = files.create(probe)
        try:
            files.write(file, 0, [memoryview(b"?")])
            files.sync(file)
        finally:
            files.close(file)
            files.unlink(probe)
    except OSError as error:
        if error.errno in FULL:
            raise NoSpace(directory, needed, free_bytes(directory), "nothing can be written") from error
        raise CheckpointError(f"{directory}: checkpoints cannot be written there ({error.strerror}): name another "
                              f"directory, or allow writing") from error
    free = free_bytes(directory)
    if free < needed:
        raise NoSpace(directory, needed, free, "looked at before the first save")
    return free
