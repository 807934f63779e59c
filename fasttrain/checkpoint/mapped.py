"""Data files mapped into memory, and their bytes compared with checksums."""

from __future__ import annotations

import mmap
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.checkpoint.errors import Damaged, Incomplete, Malformed
from fasttrain.checkpoint.manifest import DataFile, Part, digest


def map_file(path: Path) -> memoryview:
    """A file's bytes, read from the disk when they are looked at.

    Raises:
        Incomplete: it is not there.
        Damaged: it cannot be read, or is no plain file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise Incomplete(f"{path}: not there") from error
    except OSError as error:
        raise Damaged(path, f"cannot be read: {error.strerror}") from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise Malformed(path, "no plain file")
        if found.st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(descriptor, found.st_size, access=mmap.ACCESS_READ))
    finally:
        os.close(descriptor)


def unmap(view: memoryview) -> None:
    """Give a mapped file back: at once, or as soon as the traceback of an error holds no slice of it."""
    mapped: Any = view.obj
    view.release()
    if isinstance(mapped, mmap.mmap):
        with suppress(BufferError):
            mapped.close()


def check_size(path: Path, view: memoryview, told: DataFile) -> None:
    """Refuse a file of another size than was written."""
    if len(view) != told.size:
        raise Damaged(path, f"{len(view):,} bytes where {told.size:,} were written")


def check_header(path: Path, view: memoryview, told: DataFile) -> None:
    """Refuse a file whose header is not the one that was written."""
    if digest(view[: told.header]) != told.header_xxh3:
        raise Damaged(path, "its header is not what was written (xxh3 differs)")


def chunk_of(part: Part, index: int) -> tuple[int, int]:
    """Where a chunk of a part begins and ends, counted from the part's begin."""
    return index * part.chunk, min((index + 1) * part.chunk, part.nbytes)


def is_good(view: memoryview, part: Part, index: int) -> bool:
    """Whether a chunk of a part is what was written."""
    low, high = chunk_of(part, index)
    return digest(view[part.offset + low : part.offset + high]) == part.chunks[index]


def flat(out: memoryview | np.ndarray | None, nbytes: int, name: str) -> memoryview:
    """Where what is read is to be written, as bytes."""
    if out is None:
        out = np.empty(nbytes, np.uint8)
    view = memoryview(out)  # type: ignore[arg-type]
    if view.readonly or not view.c_contiguous or view.nbytes != nbytes:
        raise ValueError(f"out must be writable and contiguous and have {nbytes} bytes for what is read of {name!r}; "
                         f"it has {view.nbytes}{', read-only' * view.readonly}{', strided' * (not view.c_contiguous)}")
    return np.frombuffer(view, np.uint8).data if nbytes else memoryview(bytearray())
