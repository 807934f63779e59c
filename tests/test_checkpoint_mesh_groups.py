"""Groups of optimizers in stages: each has its own parameters in them, perhaps none; their options are one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import ranks
import torch
from cutmeshes import Run, mesh_of

from fasttrain.checkpoint import Checkpointer, Mismatch, Reader, load
from fasttrain.checkpoint.saved import OfReader, Saved
from fasttrain.checkpoint.together import told_of


class Fewer(Run):
    """With only those groups that have parameters: the first of four stages has an embedding alone."""

    def __init__(self, name: str, seed: int = 0, tied: bool = True):
        super().__init__(mesh_of(name), seed=seed, tied=tied)
        groups = [group for group in self.optimizer.param_groups if group["params"]]
        self.optimizer = type(self.optimizer)([{"params": group["params"], "weight_decay": group["weight_decay"]}
                                               for group in groups], lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)


def saves(wire: Any, folder: str, name: str, drift: bool) -> None:
    run = Fewer(name, tied=not drift)
    for _ in range(2):
        run.step()
    if drift and wire.rank == 1:
        run.optimizer.param_groups[0]["lr"] = 0.5
    with Checkpointer(f"{folder}/{name}", mesh=run.mesh) as checkpoints:
        checkpoints.save(2, run.state()).wait()


def loads(wire: Any, folder: str, name: str, tied: bool = True) -> Any:
    run = Fewer(name, seed=1, tied=tied)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(folder, run.state(), mesh=run.mesh)
    except Mismatch as error:
        return error.problems
    return [(group["lr"], group["weight_decay"], len(group["params"])) for group in run.optimizer.param_groups], \
        run.schedule.get_last_lr()


def test_a_schedule_is_loaded_from_a_stage_with_as_many_groups(tmp_path: Path) -> None:
    ranks.run(saves, 4, str(tmp_path), "pipeline 4", False)
    whole, rates = ranks.run(loads, 1, str(tmp_path / "pipeline 4"), "single")[0]
    assert rates == [lr for lr, _, _ in whole]
    assert [(decay, count) for _, decay, count in whole] == [(0.1, 4), (0.0, 4)]
    assert len(set(rates)) == 1
    assert rates[0] < 1e-2, "it has stepped"
    for groups, own in ranks.run(loads, 4, str(tmp_path / "pipeline 4"), "pipeline 4"):
        assert own == [lr for lr, _, _ in groups] == rates[:len(own)]
    with Reader(next((tmp_path / "pipeline 4").glob("step-*"))) as reader:
        saved = Saved(OfReader(reader))
        told = told_of(saved, "optimizer")
        assert [len(saved.entry("optimizer", rank)["groups"]) for rank in range(4)] == [1, 2, 1, 2]
    assert [group["names"] for group in told["groups"]] == [
        ["embed.weight", "mix.weight", "up.weight", "down.weight"],
        ["up.bias", "norm.weight", "norm.bias", "down.bias"]]


def test_a_schedule_of_other_groups_is_refused(tmp_path: Path) -> None:
    ranks.run(saves, 1, str(tmp_path), "single", False)
    answers = ranks.run(loads, 4, str(tmp_path / "single"), "pipeline 4")
    assert answers == [["schedule: its optimizer has 1 groups, that of the checkpoint 2"]] * 4


def test_options_that_differ_between_stages_are_told(tmp_path: Path) -> None:
    """They load where each stage has its own again, and not where a group would have both."""
    ranks.run(saves, 2, str(tmp_path), "pipeline 2", True)
    answers = ranks.run(loads, 2, str(tmp_path / "pipeline 2"), "pipeline 2", False)
    rates = [[lr for lr, _, _ in groups] for groups, _ in answers]
    assert rates[1] == [0.5, rates[0][0]]
    assert rates[0] == [rates[0][0]] * 2
    (problems,) = ranks.run(loads, 1, str(tmp_path / "pipeline 2"), "single", False)
    assert problems == ["optimizer: group 0 has parameters of the checkpoint's groups 0, 2, whose options differ: make "
                        "the groups as they were saved",
                        "schedule: its optimizers had different options in the stages of the checkpoint's pipeline, of "
                        "which there were another number: give the optimizer of every stage all groups, also those of "
                        "which it has no parameters"]
