"""Where documents come from: files below a directory, in an order and with a hash that depend on their names alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from stat import S_ISREG
from typing import Any, TypeVar

Name = TypeVar("Name", str, int)
SEPARATOR = b"\0"  # ends a document of bytes; a file that contains it is not text


def walk(root: Path, enter: Callable[[str], bool] = lambda folder: True,
         take: Callable[[Path], bool] = lambda path: True) -> dict[str, Path]:
    """Files below a directory by their path relative to it, with forward slashes; but no hidden ones, pipes or sockets.

    Args:
        enter: whether to look into a directory of this name.
        take: whether to take a file.

    Raises:
        OSError: a directory, or a file, cannot be read.
    """
    def stop(error: OSError) -> None:
        raise error

    found = {}
    for folder, folders, names in os.walk(root, onerror=stop):
        folders[:] = [f for f in folders if not f.startswith(".") and enter(f)]
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or not take(path):
                continue
            if S_ISREG(path.stat().st_mode):  # to open a pipe would wait for its writer
                found[path.relative_to(root).as_posix()] = path
    return found


def share(content: bytes) -> float:
    """The hash of a name, or of a document's contents, as a number in [0, 1).

    Example:
        >>> round(share(b"a.py"), 6)
        0.940888
    """
    return _share(hashlib.sha256(content))


def share_of_file(path: Path) -> float:
    """The hash of what is in a file."""
    with open(path, "rb") as file:
        return _share(hashlib.file_digest(file, "sha256"))


def _share(digest: Any) -> float:
    return int.from_bytes(digest.digest()[:6], "big") / 2**48


def share_of_path(name: str) -> float:
    """The hash of a path, whatever bytes it has."""
    return share(name.encode("utf-8", "surrogateescape"))


def division(shares: dict[Name, float], part: float) -> set[Name]:
    """Which of at least two documents are held out: those whose share is below `part`; never none, and never all.

    Whether a document is does not depend on which others there are, but where that would leave a side empty: the one
    of the lowest (highest) share goes there.
    """
    by_share = sorted(shares, key=lambda name: (shares[name], name))
    inside = sum(share < part for share in shares.values())
    return set(by_share[: min(max(inside, 1), len(by_share) - 1)])
