"""Worker processes: what they need, what they leave, and what is said when one ends."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT
from tokens import Target

from fasttrain.data import DataError, WorkerDied
from fasttrain.data.processes import Worker, answers

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}

TINY = """
import shutil, sys
import numpy as np
from fasttrain.data import Windows, tokenize
from fasttrain.data.prefetch import Processes
assert shutil.disk_usage("/dev/shm").total <= 4096
source = Windows(np.arange(1000000, dtype=np.uint32), 100000)
fetching = Processes(source, lambda arrays: arrays["tokens"], workers=2)
for first in range(4):
    fetching.ask([(2 * first, 2)])
for first in range(4):
    assert np.array_equal(fetching.take(), source.batch(2 * first, 2))
fetching.close()
print(tokenize([sys.argv[1]], sys.argv[2], processes=2)["splits"]["train"]["tokens"])
"""


def test_a_tiny_dev_shm_does_not_matter(tmp_path):
    """Row 24 of the faults: a batch of 800 kB through workers where /dev/shm has one page."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-mr", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a /dev/shm of their own (unshare -mr)")
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / name).write_text("some text")
    script = 'mount -t tmpfs -o size=4k none /dev/shm && exec "$@"'
    done = subprocess.run(["unshare", "-mr", "sh", "-c", script, "sh", sys.executable, "-c", TINY, str(tmp_path / "in"),
                           str(tmp_path / "out")], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "10\n"), done.stderr


@pytest.fixture(scope="module")
def worker():
    sys.path.insert(0, str(ROOT / "tests"))  # where workers find this file
    made = Worker(Target(), "worker 0")
    yield made
    made.close()
    sys.path.remove(str(ROOT / "tests"))


def test_answers_come_in_order(worker):
    worker.ask("add", 1, 2)
    worker.ask("count", 3)
    worker.ask("add", "a", "b")
    expected = [("value", 3), ("part", 0), ("part", 1), ("part", 2), ("value", "done"), ("value", "ab")]
    assert [worker.answer() for _ in expected] == expected
    worker.ask("add", np.ones(2), 1)
    (who, (kind, value)), = answers([worker])
    assert (who, kind, value.tolist()) == (worker, "value", [2, 2])


def test_errors_come_back_as_they_are_and_the_worker_lives_on(worker):
    worker.ask("fail", DataError("this is wrong"))
    with pytest.raises(DataError, match="this is wrong") as caught:
        worker.answer()
    assert caught.value.__notes__ == ["raised in worker 0"]
    worker.ask("fail_strangely")
    with pytest.raises(RuntimeError, match="Unpicklable: no way"):
        worker.answer()
    worker.ask("add", 1, 1)
    assert worker.answer() == ("value", 2)


def test_a_worker_imports_only_what_it_needs(worker):
    worker.ask("imported")
    assert worker.answer() == ("value", [])


def test_only_the_loader_needs_torch():
    names = "order windows shard writing dataset mixture packing position prefetch processes plan encoders make"
    modules = ", ".join(f"fasttrain.data.{name}" for name in names.split())
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT).returncode == 0


@pytest.mark.parametrize("code, said", [(3, "worker 1 ended with exit code 3"), (None, "killed by SIGBUS: a file")])
def test_how_a_worker_ended_is_said(worker, code, said):
    other = Worker(Target(), "worker 1")
    if code is None:
        other.process.send_signal(signal.SIGBUS)
    else:
        other.ask("end", code)
    with pytest.raises(WorkerDied, match=said):
        other.answer()
    with pytest.raises(WorkerDied, match=said):
        other.ask("add", 1, 1)
    other.close()


ORPHAN = """
import os, signal, sys
from fasttrain.data.processes import Worker
from tokens import Target
worker = Worker(Target(), "worker 0")
print(worker.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_their_parent():
    done = subprocess.run([sys.executable, "-c", ORPHAN], env=ENVIRONMENT, capture_output=True, text=True)
    pid = int(done.stdout)
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{pid}") and open(f"/proc/{pid}/stat").read().split()[2] != "Z":  # noqa: SIM115
        assert time.monotonic() < deadline
        time.sleep(0.01)
