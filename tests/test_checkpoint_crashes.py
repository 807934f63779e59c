"""Every prefix of what a save does to the disk, after kills and after power failures that lose what was not synced."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from checkpointing import proven, save
from crashing import Disk, Operation, Recorder, lay_out

from fasttrain.checkpoint import Keep, Lock, clean, complete, newest, prune
from fasttrain.checkpoint.disk import Files

ROWS = 4


def recorded(root: Path, world: int, files: Recorder) -> tuple[int, int, int]:
    """Two saves, and the removal of the first. Returns how many operations were done before, and after each save."""
    root.mkdir()
    save(root, 1, world, files, rows=ROWS)
    first = len(files.done)
    save(root, 2, world, files, rows=ROWS)
    second = len(files.done)
    assert prune(root, Keep(last=1), files) == [root / "step-000000000001"]
    return 0, first, second


def newest_step(root: Path) -> int | None:
    """The step that is loaded after a restart; every checkpoint that counts as complete is proven."""
    steps = [proven(found.path, ROWS) for found in complete(root) if found.reason is None]
    return steps[0] if steps else None


@pytest.mark.parametrize("world", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_every_prefix(world: int, tmp_path: Path) -> None:
    files, draw = Recorder(), random.Random(world)
    root = tmp_path / "checkpoints"
    _, first, second = recorded(root, world, files)
    assert {operation[0] for operation in files.done} == {
        "make directory", "create", "write", "sync", "sync directory", "rename", "remove"}
    tried = set()
    for count in range(len(files.done) + 1):
        for kind, tree in Disk(root, files.done[:count]).outcomes(draw):
            lay_out(tree, tmp_path / "after")
            found = newest_step(tmp_path / "after")
            allowed = {2} if count >= second else {1, 2} if count >= first else {None, 1}
            assert found in allowed, f"{kind}, {count} operations done, the last {files.done[count - 1][:2]}"
            tried.add((kind, found))
            if kind == "killed":
                with Lock(tmp_path / "after") as lock:
                    clean(lock)
                assert newest_step(tmp_path / "after") == found
                assert not [path for path in (tmp_path / "after").iterdir() if path.name.startswith(".")]
            shutil.rmtree(tmp_path / "after")
    assert {(kind, step) for kind, _ in tried for step in (None, 1, 2)} == tried


def without(operations: list[Operation], what: str, last: bool) -> list[Operation]:
    """The same operations, but one sync left out."""
    numbers = [number for number, operation in enumerate(operations) if operation[0] == what]
    number = numbers[-1] if last else numbers[0]
    return operations[:number] + operations[number + 1 :]


@pytest.mark.parametrize("what,last", [("sync", False), ("sync", True), ("sync directory", True)])
def test_the_model_sees_a_sync_that_is_missing(what: str, last: bool, tmp_path: Path) -> None:
    """Left out of the record, each would lose a checkpoint: the tests above can fail."""
    files, draw, root = Recorder(), random.Random(3), tmp_path / "checkpoints"
    root.mkdir()
    save(root, 1, 1, files, rows=ROWS)
    lost = []
    for kind, tree in Disk(root, without(files.done, what, last)).outcomes(draw):
        lay_out(tree, tmp_path / "after")
        found = complete(tmp_path / "after")
        try:
            ok = bool(found) and found[0].reason is None and proven(found[0].path, ROWS) == 1
        except RuntimeError:
            ok = False
        if not ok:
            lost.append(kind)
        shutil.rmtree(tmp_path / "after")
    assert lost


class Failing(Files):
    """A disk of which one operation fails."""

    def __init__(self, what: str, error: OSError):
        self._what, self._error = what, error

    def rename(self, old: Path, new: Path) -> None:
        self._perhaps("rename", new)
        super().rename(old, new)

    def sync_directory(self, path: Path) -> None:
        self._perhaps("sync", path)
        super().sync_directory(path)

    def _perhaps(self, what: str, path: Path) -> None:
        if f"{what} {path.name}" == self._what:
            raise self._error


@pytest.mark.parametrize("what", ["rename rank-00000-of-00001.json", "rename manifest.json", "rename step-000000000002",
                                  "sync .part-2-a"])
def test_an_operation_fails(what: str, tmp_path: Path) -> None:
    """The error is told, the old checkpoint is what there was, and a second attempt succeeds."""
    save(tmp_path, 1, rows=ROWS)
    with pytest.raises(OSError, match="I/O error"):
        save(tmp_path, 2, files=Failing(what, OSError(5, os.strerror(5).replace("Input/output", "I/O"))), rows=ROWS)
    assert newest_step(tmp_path) == 1
    save(tmp_path, 2, attempt="b", rows=ROWS)
    assert newest_step(tmp_path) == 2
    found = newest(tmp_path)
    assert found is not None
    assert found.sequence == 2
