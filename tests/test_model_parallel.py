"""The example of model parallelism: the losses of one process on every mesh, and a run that goes on under another."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from ranks import run
from torch import nn

from fasttrain.parallel import Mesh, tensor_parallel
from fasttrain.train.stepper import Stepper

EXAMPLE = ROOT / "examples" / "model_parallel.py"


def losses(wire: Any, options: str) -> list[float | str]:
    """What the example's records say, on this rank."""
    records = runpy.run_path(str(EXAMPLE))["main"](options.split())
    return [record.get("text") or record["loss"] for record in records]


def trained(size: int, options: str) -> list[Any]:
    answers = run(losses, size, options)
    assert all(answer == answers[0] for answer in answers)
    return answers[0]


def test_the_example_trains_alike_on_every_mesh(tmp_path: Path) -> None:
    fifth, tenth = trained(1, "--steps 10")
    assert tenth < fifth
    bound = 1e-5  # fp32: other orders of sums, through ten steps
    assert trained(4, f"--tensor 2 --pipeline 2 --steps 5 --out {tmp_path}") == [pytest.approx(fifth, rel=bound)]
    resumed, last = trained(4, f"--shard 2 --pipeline 2 --steps 10 --out {tmp_path}")
    assert resumed == "resumed from step-000000000005"
    assert last == pytest.approx(tenth, rel=bound)
    assert trained(2, "--zero 2 --pipeline 2 --steps 5") == [pytest.approx(fifth, rel=bound)]
    assert trained(4, "--zero 1 --tensor 2 --steps 5") == [pytest.approx(fifth, rel=bound)]


def of_torch(wire: Any) -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4))
    tensor_parallel(model, Mesh(tensor=2), {"1": "column", "2": "row"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"some are whole.*take an optimizer of fasttrain\.optim.*or clip=0"):
        Stepper(model, optimizer, lambda model, x: model(x).square().mean(), clip=1.0)


def test_torchs_optimizers_are_told_that_they_cannot_clip() -> None:
    run(of_torch, 2)


def table(wire: Any) -> str:
    return str(Mesh(pipeline=2, tensor=2))


def test_the_page_shows_a_mesh_as_it_is_printed() -> None:
    assert run(table, 8)[5] in (ROOT / "docs" / "model-parallel.md").read_text()


@pytest.mark.slow
def test_the_example_runs_under_torchrun(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", EXAMPLE, "--tensor", "2",
         "--pipeline", "2", "--steps", "5", "--out", tmp_path / "run"], capture_output=True, text=True, timeout=180,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=False)
    assert found.returncode == 0, found.stderr
    assert "mesh of 4 ranks: pipeline 2 x tensor 2" in found.stdout
    assert "step 5: " in found.stdout
