"""`fasttrain demo`: what it compares, and the whole of it."""

import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from fasttrain.checkpoint import Checkpointer
from fasttrain.train import demo
from fasttrain.train.config import BadInput
from fasttrain.train.journal import Journal


def run(directory, weight, loss):
    directory.mkdir()
    (directory / "config.json").write_text('{"config": {}, "text": {}}')
    journal = Journal(directory / "log.jsonl")
    journal.write({"event": "train", "step": 1, "loss": loss})
    journal.close()
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, weight)
    nn.init.zeros_(model.bias)
    with Checkpointer(directory / "checkpoints") as checkpoints:
        checkpoints.save(1, {"model": model, "none": torch.zeros(0)})
    return directory


@pytest.mark.parametrize("weight, loss, equal", [(1.0, 2.0, True), (1.0 + 2**-23, 2.0, False), (1.0, 2.5, False)])
def test_one_bit_is_a_difference(tmp_path, weight, loss, equal):
    said = []
    assert demo.compare(run(tmp_path / "a", 1.0, 2.0), run(tmp_path / "b", weight, loss), said.append) is equal
    assert ("DIFFERENT: model/weight" in said[0]) == (weight != 1.0)
    assert ("DIFFERENT" in said[1]) == (loss != 2.0)


def test_a_directory_that_exists_is_refused(tmp_path):
    with pytest.raises(BadInput, match="exists"):
        demo.demo(tmp_path, 1)


@pytest.mark.slow
def test_the_whole_of_it():
    done = subprocess.run([sys.executable, "-m", "fasttrain", "demo"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"killed 2 processes by SIGKILL; .*left unfinished: \.part-", done.stdout)
    assert re.search(r"78 tensors .*: identical, bit for bit", done.stdout)
    assert re.search(r"3 losses of the logs: identical", done.stdout)
