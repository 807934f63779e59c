"""Every operation that changes a disk, in one small object: a test puts its own in its place, and replays them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


class Files:
    """The operations that checkpoints are written with. Each is done, or raises OSError."""

    def make_directory(self, path: Path) -> None:
        """Make a directory; one that is there is an error."""
        os.mkdir(path)

    def create(self, path: Path) -> int:
        """Make a file that is not there yet, and open it for writing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)

    def write(self, file: int, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write buffers of bytes one behind the other, from `offset`; the interpreter lock is free meanwhile."""
        left = list(buffers)
        while left:
            written = os.pwritev(file, left[:1024], offset)  # the most that Linux takes in one call
            offset += written
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if written:
                left[0] = left[0][written:]

    def hasten(self, file: int, offset: int, size: int) -> None:
        """Let the disk begin to write these bytes, without waiting; a later `sync` has less to wait for.

        Linux does so for pages that it is told will not be needed; it also drops them when they are clean, so that a
        checkpoint does not push the data set out of the page cache.
        """
        os.posix_fadvise(file, offset, size, os.POSIX_FADV_DONTNEED)

    def sync(self, file: int) -> None:
        """Make what was written durable."""
        os.fsync(file)

    def close(self, file: int) -> None:
        """Close a file."""
        os.close(file)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file or a directory another name in the same directory; a file that has it is replaced."""
        os.rename(old, new)

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""
        file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        finally:
            os.close(file)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        os.rmdir(path)


DISK = Files()


def make_directories(path: Path, files: Files = DISK) -> None:
    """Make a directory and those above it, durably; they may be there."""
    if not path.is_dir():
        make_directories(path.parent, files)
        with suppress(FileExistsError):  # another process was faster; a file of that name fails below
            files.make_directory(path)
        files.sync_directory(path.parent)


def write_whole(path: Path, content: bytes, files: Files = DISK) -> None:
    """A small file: durable and whole under its name, or not there. Its directory is still to be synced."""
    being_written = path.with_name(path.name + ".tmp")
    file = files.create(being_written)
    try:
        files.write(file, 0, [memoryview(content)] if content else [])
        files.sync(file)
    finally:
        files.close(file)
    files.rename(being_written, path)


def empty(path: Path, files: Files = DISK) -> None:
    """Remove a directory and the files in it; or a file."""
    if path.is_symlink() or not path.is_dir():
        files.unlink(path)
        return
    for entry in sorted(path.iterdir()):
        empty(entry, files)
    files.remove_directory(path)
