"""One writer for each directory: a lock that the kernel forgets with its holder, and a note of who that is."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import weakref
from datetime import UTC, datetime
from pathlib import Path

from fasttrain.checkpoint.disk import make_directories
from fasttrain.checkpoint.errors import CheckpointError, Locked

NAME = "lock"


class Lock:
    """The right to write into a directory of checkpoints; a context manager.

    The lock is the kernel's (`flock`): it ends with the process however that ends, and at a reboot. What is written in
    the file is only who holds it. Processes that the holder forks do not hold it with it. On network file systems it is
    only as good as theirs: NFS passes it on to the server, others keep it to one machine or have none.

    Arguments:
        directory: made if it is not there.

    Attributes:
        recovered: of whom the lock was taken over that never gave it back, in words; None if it was free.

    Raises:
        Locked: another process holds it; which, where, and since when.
        CheckpointError: the file system has no locks.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        make_directories(self.directory)
        self.recovered: str | None = None
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file: int | None = os.open(self.directory / NAME, flags, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.recovered = self._holder()
            self._write({"pid": os.getpid(), "host": socket.gethostname(),
                         "since": datetime.now(UTC).isoformat(timespec="seconds")})
        except OSError as error:
            who = self._holder()
            os.close(self._file)
            self._file = None
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise Locked(f"{self.directory}: {who or 'another process'} writes its checkpoints here; end it, or "
                             f"name another directory") from error
            raise CheckpointError(f"{self.directory}: cannot be locked for one writer ({error.strerror}): use a file "
                                  f"system with flock") from error
        _held.add(self)

    @property
    def held(self) -> bool:
        """Whether it is held by this process."""
        return self._file is not None

    def release(self) -> None:
        """Give it back."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            self._forget()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _forget(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _holder(self) -> str | None:
        """Who wrote the note, if there is one."""
        assert self._file is not None
        note = os.pread(self._file, 4096, 0)
        if not note:
            return None
        with contextlib.suppress(ValueError, KeyError, TypeError):
            tree = json.loads(note)
            return f"process {tree['pid']} on {tree['host']} (since {tree['since']})"
        return "a process that left no readable note"

    def _write(self, tree: dict[str, object]) -> None:
        assert self._file is not None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(tree).encode(), 0)


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _in_child() -> None:
    for lock in list(_held):
        lock._forget()


os.register_at_fork(after_in_child=_in_child)
