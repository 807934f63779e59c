"""One writer for each directory, whatever becomes of it."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest
from checkpointing import save
from forks import python

from fasttrain.checkpoint import Lock, Locked
from fasttrain.checkpoint.errors import CheckpointError

SECOND = """
import sys
from fasttrain.checkpoint import Lock
try:
    with Lock(sys.argv[1]) as lock:
        print("held", lock.recovered)
except RuntimeError as error:
    print(type(error).__name__, error)
"""


def test_a_second_trainer_is_refused(tmp_path: Path) -> None:
    """It is told who is first; and comes in as soon as the first has left."""
    directory = tmp_path / "a" / "b"
    with Lock(directory) as lock:
        assert lock.held
        said = python(SECOND, str(directory)).stdout
        assert said.startswith(f"Locked {directory}: process {os.getpid()} on {socket.gethostname()} (since 20")
        assert "writes its checkpoints here; end it, or name another directory" in said
        with pytest.raises(Locked):
            Lock(directory)
    assert not lock.held
    lock.release()
    assert python(SECOND, str(directory)).stdout == "held None\n"
    with Lock(tmp_path / "a"):  # another directory is another matter
        pass


def test_a_lock_whose_holder_was_killed(tmp_path: Path) -> None:
    """It is free at once, and whose it was is told; after a reboot too, where its number may be another process's."""
    done = python("import os, sys; from fasttrain.checkpoint import Lock; lock = Lock(sys.argv[1]); print(os.getpid(), "
                  "flush=True); os.kill(os.getpid(), 9)", str(tmp_path))
    assert done.returncode == -signal.SIGKILL
    with Lock(tmp_path) as lock:
        assert lock.recovered is not None
        assert lock.recovered.startswith(f"process {done.stdout.strip()} on {socket.gethostname()} (since ")
        assert json.loads((tmp_path / "lock").read_bytes())["pid"] == os.getpid()
    with Lock(tmp_path) as lock:
        assert lock.recovered is None


def test_children_do_not_hold_it(tmp_path: Path) -> None:
    """Worker processes may outlive the trainer that forked or started them."""
    code = """
import os, subprocess, sys, time
from fasttrain.checkpoint import Lock
lock = Lock(sys.argv[1])
started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
child = os.fork()
if child == 0:
    assert not lock.held
    for standard in (0, 1, 2):
        os.close(standard)
    time.sleep(60)
print(started.pid, child, flush=True)
os._exit(1)
"""
    done = python(code, str(tmp_path))
    children = [int(number) for number in done.stdout.split()]
    try:
        with Lock(tmp_path) as lock:
            assert lock.recovered is not None
            for child in children:
                os.kill(child, 0)  # lives
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("note", [b"\x00\xff", b"[]", b'{"pid": 3}', b"7"])
def test_a_note_that_says_nothing(note: bytes, tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(note)
    with Lock(tmp_path) as lock:
        assert lock.recovered == "a process that left no readable note"


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be locked .* \(Operation not supported\): use a file system"):
        Lock(tmp_path)


def test_reading_needs_no_lock(tmp_path: Path) -> None:
    with Lock(tmp_path):
        save(tmp_path, 1, rows=4)
        code = "import sys; from fasttrain.checkpoint import newest; print(newest(sys.argv[1]).step)"
        assert python(code, str(tmp_path)).stdout == "1\n"
