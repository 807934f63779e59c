"""Files that are made at run time and loaded as code later: in a directory that only this user can write."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import tempfile
from pathlib import Path

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def directory() -> Path:
    """The directory, made if it is not there: FASTTRAIN_CACHE_DIR, or `fasttrain` in the user's cache directory.

    Raises:
        PermissionError: somebody else could put a file there; the message says who and what to do.
        OSError: it cannot be made.
    """
    path = Path(os.path.abspath(os.environ.get("FASTTRAIN_CACHE_DIR") or usual())).resolve()
    remedy = "set FASTTRAIN_CACHE_DIR to a directory of your own"
    try:
        for missing in [part for part in reversed((path, *path.parents)) if not part.exists()]:
            missing.mkdir(mode=0o700, exist_ok=True)  # `parents=True` would make them as the umask says
        path.mkdir(exist_ok=True)  # raises where a file stands
    except OSError as error:
        raise OSError(f"the cache directory {path} cannot be made ({error.strerror}): {remedy}") from None
    found = path.stat()
    if found.st_uid != os.geteuid():
        raise PermissionError(f"the cache directory {path} belongs to user {found.st_uid}, and this process to user "
                              f"{os.geteuid()}: code is loaded from there, so {remedy}")
    if found.st_mode & OTHERS_WRITE:
        raise PermissionError(f"the cache directory {path} can be written by others (mode {found.st_mode & 0o7777:o}): "
                              f"code is loaded from there, so chmod 700 it, or {remedy}")
    for parent in path.parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise PermissionError(f"the cache directory {path} can be replaced by others, who can write {parent} (mode "
                                  f"{mode & 0o7777:o}): code is loaded from there, so chmod o-w {parent}, or {remedy}")
    return path


def usual() -> str:
    """Where the cache is if nobody says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as its specification says
        base = os.path.expanduser("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    return os.path.join(base, "fasttrain")


def get(name: str) -> Path | None:
    """The path of an entry; None if there is none, if it is damaged, or if somebody else could have written it.

    Raises:
        OSError: as `directory`.

    Example:
        >>> import tempfile
        >>> from unittest import mock
        >>> with tempfile.TemporaryDirectory() as place, mock.patch.dict(os.environ, FASTTRAIN_CACHE_DIR=place):
        ...     path = put("greeting", b"hello")
        ...     sound = get("greeting") == path
        ...     _ = path.write_bytes(path.read_bytes()[:-1])
        ...     sound, get("greeting")
        (True, None)
    """
    return directory() / name if read(name) is not None else None


def read(name: str) -> bytes | None:
    """What an entry holds; None as `get`.

    Raises:
        OSError: as `directory`.
    """
    path = directory() / name
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & OTHERS_WRITE:
            return None
        with open(file, "rb", closefd=False) as entry:
            content = entry.read()
    finally:
        os.close(file)
    body, kept = content[:-32], content[-32:]
    return body if kept == seal(name, body) else None


def put(name: str, body: bytes) -> Path:
    """Make or replace an entry in one piece, and return its path. What stood there stays whole for who has it open.

    Raises:
        OSError: as `directory`, or the disk is full.
    """
    path = directory() / name
    file, temporary = tempfile.mkstemp(prefix=f"{name}.", suffix=".part", dir=path.parent)  # for this user alone
    try:
        with open(file, "wb") as entry:
            entry.write(body + seal(name, body))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def seal(name: str, body: bytes) -> bytes:
    """What ends an entry; loaders of shared objects do not look behind the last section."""
    return hashlib.sha256(name.encode() + b"\0" + body).digest()
