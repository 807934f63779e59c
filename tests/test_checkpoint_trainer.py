"""A real training with asynchronous saves that is killed again and again, and goes on with the same command."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import forks
import torch
from checkpointed import assert_same

TRAINS = """
import sys, torch
from checkpointed import Run
from fasttrain.checkpoint import Checkpointer
run = Run(None, None, "8-byte")
with Checkpointer(sys.argv[1], every=1, keep=2) as checkpoints:
    loaded = checkpoints.load(run.state())
    for number in range(0 if loaded is None else loaded.step, int(sys.argv[2])):
        run.step(number)
        checkpoints.save(number + 1, run.state())
        print(number + 1, flush=True)
torch.save(run.whole(), sys.argv[3])
"""


def test_a_training_that_is_killed_again_and_again_ends_in_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL wherever it is, saves under way among them; the same command goes on."""
    steps = "40"
    done = forks.python(TRAINS, str(tmp_path / "unbroken"), steps, str(tmp_path / "unbroken.pt"))
    assert done.returncode == 0, done.stderr
    for number, delay in enumerate((0.0, 0.003, 0.01, 0.03)):
        said = tmp_path / f"out {number}"
        process = forks.context.Process(target=forks._python, args=(
            TRAINS, (str(tmp_path / "killed"), steps, str(tmp_path / "killed.pt")), dict(os.environ),
            (said, tmp_path / "errors")))
        process.start()
        while not said.exists() or said.read_text().count("\n") < 2:  # it has made two more steps
            assert process.exitcode is None, (tmp_path / "errors").read_text()
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    done = forks.python(TRAINS, str(tmp_path / "killed"), steps, str(tmp_path / "killed.pt"))
    assert done.returncode == 0, done.stderr
    assert_same(torch.load(tmp_path / "killed.pt"), torch.load(tmp_path / "unbroken.pt"))
    assert len(list((tmp_path / "killed").glob("step-*"))) == 2
    assert not list((tmp_path / "killed").glob(".*"))
