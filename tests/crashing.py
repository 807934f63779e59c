"""A disk that forgets: recorded operations are replayed up to any of them, and what was not synced may be lost.

After a power failure a file that was not synced may be empty, full of zeros, or hold some of its writes; a name that
was not synced with its directory may be there or not, and what was renamed may have its old name. What was synced is
there.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasttrain.checkpoint.disk import Files

Operation = tuple[Any, ...]


class Recorder(Files):
    """Does every operation and writes it down."""

    def __init__(self) -> None:
        self.done: list[Operation] = []
        self._open: dict[int, int] = {}
        self._number = 0

    def make_directory(self, path: Path) -> None:
        super().make_directory(path)
        self.done.append(("make directory", path))

    def create(self, path: Path) -> int:
        file = super().create(path)
        self._number += 1
        self._open[file] = self._number
        self.done.append(("create", path, self._number))
        return file

    def write(self, file: int, offset: int, buffers: Sequence[memoryview]) -> None:
        super().write(file, offset, buffers)
        self.done.append(("write", self._open[file], offset, b"".join(buffers)))

    def sync(self, file: int) -> None:
        super().sync(file)
        self.done.append(("sync", self._open[file]))

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        self.done.append(("rename", old, new))

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self.done.append(("sync directory", path))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.done.append(("remove", path))

    def remove_directory(self, path: Path) -> None:
        super().remove_directory(path)
        self.done.append(("remove", path))


@dataclass
class File:
    """Its bytes on the disk, and the writes that are not there yet."""

    durable: bytes = b""
    waiting: list[tuple[int, bytes]] = field(default_factory=list)

    def now(self) -> bytes:
        return written(self.durable, self.waiting)


@dataclass
class Directory:
    """Its names on the disk, and the changes that are not there yet: {name: what, or None if it is gone}."""

    durable: dict[str, Any] = field(default_factory=dict)
    waiting: list[dict[str, Any]] = field(default_factory=list)

    def now(self) -> dict[str, Any]:
        return changed(self.durable, self.waiting)


def written(content: bytes, writes: Sequence[tuple[int, bytes]]) -> bytes:
    """A file's bytes after some writes."""
    result = bytearray(content)
    for offset, data in writes:
        result.extend(bytes(max(0, offset + len(data) - len(result))))
        result[offset : offset + len(data)] = data
    return bytes(result)


def changed(names: dict[str, Any], changes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A directory's names after some changes."""
    result = dict(names)
    for change in changes:
        result |= change
    return {name: what for name, what in result.items() if what is not None}


class Disk:
    """What a disk holds after some operations within `root`, and what it may hold after a power failure then."""

    def __init__(self, root: Path, operations: Sequence[Operation]):
        self._root, self._top = root, Directory()
        self._files: dict[int, File] = {}
        for operation in operations:
            self._apply(*operation)

    def _apply(self, what: str, *arguments: Any) -> None:
        if what == "write":
            self._files[arguments[0]].waiting.append(arguments[1:])
        elif what == "sync":
            file = self._files[arguments[0]]
            file.durable, file.waiting = file.now(), []
        elif what == "sync directory":
            found = self._at(arguments[0])
            found.durable, found.waiting = found.now(), []
        else:
            holder, name = self._at(arguments[0].parent), arguments[0].name
            if what == "make directory":
                holder.waiting.append({name: Directory()})
            elif what == "create":
                self._files[arguments[1]] = file = File()
                holder.waiting.append({name: file})
            elif what == "rename":
                assert arguments[1].parent == arguments[0].parent, "only then it is one change of one directory"
                holder.waiting.append({name: None, arguments[1].name: holder.now()[name]})
            elif what == "remove":
                holder.waiting.append({name: None})
            else:
                raise AssertionError(what)

    def _at(self, path: Path) -> Directory:
        found = self._top
        for name in path.relative_to(self._root).parts:
            found = found.now()[name]
        return found

    def outcomes(self, draw: random.Random, more: int = 4) -> Iterator[tuple[str, dict[str, Any]]]:
        """Trees that may be found: after a kill, after a power failure at its worst and its best, and some between."""
        yield "killed", self._tree(self._top, lambda d: d.now(), lambda f: f.now())
        yield "nothing but what was synced", self._tree(self._top, lambda d: d.durable, lambda f: f.durable)
        yield "names without contents", self._tree(self._top, lambda d: d.now(), lambda f: f.durable)
        yield "zeros", self._tree(self._top, lambda d: d.now(), lambda f: written(f.durable, zeros(f.waiting)))
        for _ in range(more):
            yield "some of it", self._tree(self._top, lambda d: changed(d.durable, some(draw, d.waiting)),
                                           lambda f: torn(draw, f))

    def _tree(self, top: Directory, names: Any, content: Any) -> dict[str, Any]:
        return {name: self._tree(what, names, content) if isinstance(what, Directory) else content(what)
                for name, what in names(top).items()}


def zeros(writes: Sequence[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """The file became longer, its bytes did not come."""
    return [(offset, bytes(len(data))) for offset, data in writes]


def some(draw: random.Random, things: Sequence[Any]) -> list[Any]:
    """Some of these, in order: a disk may write later ones first."""
    return [thing for thing in things if draw.random() < 0.5]


def torn(draw: random.Random, file: File) -> bytes:
    """Some writes whole, some as zeros, some cut short, some not at all."""
    writes = []
    for offset, data in some(draw, file.waiting):
        part = data[: draw.choice([len(data), len(data), draw.randrange(len(data) + 1)])]
        writes.append((offset, part if draw.random() < 0.7 else bytes(len(part))))
    return written(file.durable, writes)


def lay_out(tree: dict[str, Any], root: Path) -> None:
    """Make these directories and files."""
    root.mkdir()
    for name, what in tree.items():
        if isinstance(what, dict):
            lay_out(what, root / name)
        else:
            (root / name).write_bytes(what)
