"""Disks that fill up, directories that cannot be written into: the old checkpoint stays, both numbers are told."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpointing import proven, save
from forks import python

from fasttrain.checkpoint.files import CheckpointError, Files, NoSpace, Piece, complete, preflight, write_rank

SIZE = 1 << 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    (tmp_path / "small").mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", tmp_path / "small"],
                          capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield tmp_path / "small"
    subprocess.run(["umount", "-l", tmp_path / "small"], check=True)


def test_a_disk_that_is_full(small: Path) -> None:
    """In the middle of a file. What was written is removed: the next save, of less, has room."""
    save(small, 1, rows=500)
    with pytest.raises(NoSpace, match=r"failed \(No space left on device\): the checkpoint needs 1,440,") as caught:
        save(small, 2, rows=4000)
    assert caught.value.needed > caught.value.free > 0
    assert f"needs {caught.value.needed:,} bytes and {caught.value.free:,} are free" in str(caught.value)
    assert sorted(path.name for path in small.iterdir()) == ["step-000000000001"]
    assert proven(small / "step-000000000001", 500) == 1
    assert proven(save(small, 2, rows=500), 500) == 2


def test_full_at_any_byte(small: Path) -> None:
    """Wherever it ends, in data or manifests: one error, and the old checkpoint."""
    save(small, 1, rows=4)
    failed = 0
    for left in range(0, 13 * 4096, 4096):
        with open(small / "ballast", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, os.statvfs(small).f_bavail * 4096 - left or 1)
        try:
            save(small, 2, rows=4, attempt=str(left))
            break
        except NoSpace:
            failed += 1
        (small / "ballast").unlink()
        assert sorted(path.name for path in small.iterdir()) == ["step-000000000001"]
        assert [(one.step, one.reason) for one in complete(small)] == [(1, None)]
        assert proven(small / "step-000000000001", 4) == 1
    assert failed == 3, "a page for each of three files"
    assert [one.step for one in complete(small)] == [2, 1]


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """RLIMIT_FSIZE, as batch systems set it: the same error."""
    code = """
import resource, sys
from pathlib import Path
sys.path.insert(0, "tests")
from checkpointing import proven, save
directory = Path(sys.argv[1])
save(directory, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(directory, 2, rows=4000)
except RuntimeError as error:
    print(type(error).__name__, error)
print(proven(directory / "step-000000000001"), [path.name for path in directory.iterdir()])
"""
    first, second = python(code, str(tmp_path)).stdout.splitlines()
    assert first.startswith(f"NoSpace {tmp_path}: writing failed (File too large): the checkpoint needs 1,440,")
    assert second == "1 ['step-000000000001']"


def test_a_directory_that_is_read_only(small: Path) -> None:
    """Of a file system mounted so: what is there is read, what cannot be written is told at the start."""
    save(small, 1, rows=4)
    subprocess.run(["mount", "-o", "remount,ro", small], check=True)
    with pytest.raises(CheckpointError, match=r"cannot be written there \(Read-only file system\): name another"):
        preflight(small, 1)
    with pytest.raises(OSError, match="Read-only file system"):
        save(small, 2, rows=4)
    assert proven(small / "step-000000000001", 4) == 1


def test_a_directory_of_somebody_else(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    (tmp_path / "theirs").mkdir(mode=0o755)
    code = """
import os, sys
from pathlib import Path
from fasttrain.checkpoint import preflight
for folder in [Path(sys.argv[1]), *Path(sys.argv[1]).parents]:
    if folder.is_relative_to(sys.argv[2]):
        folder.chmod(0o755)
os.setuid(65534)
try:
    preflight(sys.argv[1], 1)
except RuntimeError as error:
    print(error)
"""
    top = next(folder for folder in tmp_path.parents if folder.parent == Path("/tmp") or folder.parent == Path("/"))
    said = python(code, str(tmp_path / "theirs"), str(top)).stdout
    assert said.endswith("(Permission denied): name another directory, or allow writing\n")


def test_preflight(tmp_path: Path, small: Path) -> None:
    free = preflight(tmp_path / "a" / "b", 1000)
    assert free > 1000
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert list((tmp_path / "a" / "b").iterdir()) == []
    with pytest.raises(NoSpace, match=rf"needs 2,000,000 bytes and {SIZE:,} are free; make room") as caught:
        preflight(small, 2_000_000)
    assert (caught.value.needed, caught.value.free) == (2_000_000, SIZE)
    assert preflight(small, SIZE) == SIZE
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"file: checkpoints cannot be written there"):
        preflight(tmp_path / "file", 1)


class Quota(Files):
    """A disk whose user may write so much."""

    def __init__(self, left: int):
        self.left = left

    def write(self, file: int, offset: int, buffers: list[memoryview]) -> None:
        self.left -= sum(map(len, buffers))
        if self.left < 0:
            raise OSError(122, "Disk quota exceeded")
        super().write(file, offset, buffers)


def test_a_quota(tmp_path: Path) -> None:
    """Another rank's files are not touched by the one that fails."""
    data = memoryview(np.zeros(1 << 16, np.uint8))
    part = tmp_path / ".part"
    write_rank(part, 0, 2, [Piece("a", "U8", (1 << 16,), data)], {})
    before = {path.name: path.read_bytes() for path in part.iterdir()}
    with pytest.raises(NoSpace, match="Disk quota exceeded"):
        write_rank(part, 1, 2, [Piece("b", "U8", (1 << 16,), data)], {}, files=Quota(1000))
    assert {path.name: path.read_bytes() for path in part.iterdir()} == before
