"""The thread that writes: its errors reach whoever asks next, and its death is no silence."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from checkpointing import proven, save
from forks import python
from helpers import ROOT

from fasttrain.checkpoint import Writer, WriterDied


def test_jobs_run_one_after_the_other() -> None:
    writer, order, go = Writer(), [], threading.Event()

    def slow() -> str:
        go.wait()
        order.append(threading.current_thread())
        return "first"

    first = writer.submit(slow, "first")
    assert writer.busy
    assert not first.done
    writer.check()  # does not wait
    with pytest.raises(TimeoutError, match=r"first has not ended after 0.01 s"):
        first.wait(0.01)
    threading.Timer(0.01, go.set).start()
    second = writer.submit(lambda: order.append(threading.current_thread()), "second")
    assert first.wait() == "first"
    second.wait()
    writer.wait()
    assert not writer.busy
    assert len(set(order)) == 2
    assert threading.main_thread() not in order
    assert all(not thread.is_alive() for thread in order)


def fail() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("how", ["submit", "check", "wait", "job"])
def test_an_error_is_raised_once_at_the_next_call(how: str) -> None:
    writer, run = Writer(), []
    job = writer.submit(fail, "the save of step 3")
    while not job.done:
        time.sleep(0.001)
    calls = {"submit": lambda: writer.submit(lambda: run.append(1)), "check": writer.check, "wait": writer.wait,
             "job": job.wait}
    with pytest.raises(OSError, match="No space left") as caught:
        calls[how]()
    assert run == []
    if how != "job":
        assert caught.value.__notes__ == ["in the save of step 3"]
    writer.check()
    writer.wait()
    writer.submit(lambda: run.append(2)).wait()
    assert run == [2]
    with pytest.raises(OSError, match="No space left"):
        job.wait()  # whoever holds the job may ask again


@pytest.mark.parametrize("end", [SystemExit(0), KeyboardInterrupt()])
def test_a_thread_that_is_ended(end: BaseException) -> None:
    """`sys.exit` in a thread ends it without a word."""
    writer = Writer()

    def die() -> None:
        raise end

    writer.submit(die, "the save of step 4")
    with pytest.raises(WriterDied, match=f"the save of step 4: its thread was ended by {type(end).__name__}") as caught:
        writer.wait()
    assert caught.value.__cause__ is end
    writer.check()


def test_a_thread_that_vanishes() -> None:
    """Nothing was told and the thread is gone: found by looking at the thread itself."""
    writer = Writer()
    job = writer.submit(lambda: None, "the save of step 5")
    job.wait()
    job._ended = False
    assert job.done
    with pytest.raises(WriterDied, match="its thread is gone, and its work is not done"):
        writer.check()


def test_in_a_fork(tmp_path: Path) -> None:
    """The child of a process that was saving has no thread that could finish it: that is told, and nothing hangs."""
    code = """
import os, sys, threading
from fasttrain.checkpoint import Writer
go = threading.Event()
writer = Writer()
job = writer.submit(go.wait, "the save of step 6")
if os.fork() == 0:
    try:
        writer.wait()
    except RuntimeError as error:
        print(type(error).__name__, error, flush=True)
    os._exit(0)
os.wait()
go.set()
writer.wait()
print("parent done", flush=True)
"""
    first, second = python(code).stdout.splitlines()
    assert first.startswith("WriterDied the save of step 6 runs in process ")
    assert first.endswith("of which this is a fork: threads are not forked")
    assert second == "parent done"


def test_the_end_of_the_program_waits_for_it(tmp_path: Path) -> None:
    """A last save is finished though nobody waits for it."""
    code = """
import sys, time
from pathlib import Path
from checkpointing import save
from fasttrain.checkpoint import Writer
Writer().submit(lambda: (time.sleep(0.1), save(Path(sys.argv[1]), 7)))
raise ValueError("the training fails")
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: the training fails\n")
    assert proven(tmp_path / "step-000000000007") == 7


def test_niceness_is_the_threads_own() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    found = Writer(nice=3).submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).wait()
    assert found == 3
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
    with pytest.raises(ValueError, match="from 0 to 19, not 20"):
        Writer(nice=20)


def test_a_save_in_the_thread(tmp_path: Path) -> None:
    writer = Writer()
    for step in (1, 2):
        writer.submit(lambda step=step: save(tmp_path, step, rows=4))
    assert proven(writer.submit(lambda: save(tmp_path, 3, rows=4)).wait(), 4) == 3
