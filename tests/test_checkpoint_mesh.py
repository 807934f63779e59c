"""Saved under any mesh, loaded under any other: equal to the bit, every element written once, and the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from checkpointed import flat
from cutmeshes import MESHES, STORED, Run, mesh_of, ranks_of, taken
from helpers import assert_same_bits
from torch import Tensor

from fasttrain.checkpoint import Checkpointer, Reader, verify

STEPS = 3  # before a save, and after a load


def saves(wire: Any, folder: str, names: list[str], stored: str) -> list[int]:
    sizes = []
    for name in names:
        run = Run(mesh_of(name), stored)
        for _ in range(STEPS):
            run.step()
        with Checkpointer(f"{folder}/{name}", mesh=run.mesh) as checkpoints:
            saving = checkpoints.save(STEPS, run.state())
            saving.wait()
        sizes.append(saving.nbytes)
    return sizes


def loads(wire: Any, folder: str, pairs: dict[str, list[str]], stored: str, wanted: dict[str, Tensor],
          later: dict[str, Tensor]) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for name, sources in pairs.items():
        mesh = mesh_of(name)
        for number, source in enumerate(sources):
            run = Run(mesh, stored, seed=1)
            if number % 2:
                run.step()  # states are there already
            with Checkpointer(f"{folder}/reading {name}", mesh=mesh) as checkpoints:
                loaded = checkpoints.load(run.state(), which=Path(folder, source, f"step-{STEPS:012}"))
                assert loaded is not None
                run.steps = STEPS
                assert loaded.values == {"config": {"width": 16}}
                # Adafactor's are not elementwise: other cuts add in another order.
                check(run, wanted, f"{source} into {name}", exact=stored != "adafactor" or source == "single")
                found.append((source, told_of(run)))
                if source == name:
                    checkpoints.save(STEPS, run.state()).wait()  # once more, the same files
            for _ in range(STEPS):
                run.step()
            check(run, later, f"{source} into {name}, later", exact=False)
    return found


def check(run: Run, wanted: dict[str, Tensor], what: str, exact: bool) -> None:
    """Everything that is held here is what one process has at these places, and nothing is forgotten."""
    held = run.held()
    assert all(f"{name}/step" in held for name, _ in run.named())
    for name, (index, own) in held.items():
        theirs = taken(wanted[name], index)
        if exact:
            assert_same_bits(own.contiguous(), theirs.contiguous(), f"{what}: {name}")
        else:
            torch.testing.assert_close(own.double(), theirs.double(), rtol=1e-10, atol=1e-10,
                                       msg=lambda text, name=name: f"{what}: {name}: {text}")


def told_of(run: Run) -> dict[str, Any]:
    return {"own": run.own.seen, "lr": run.schedule.get_last_lr(), "options": [
        {key: value for key, value in group.items() if not key.startswith("param")}
        for group in run.optimizer.param_groups]}


def alone(stored: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """One process's weights and states at the save, and later; what it has beside."""
    run = Run(None, stored)
    for _ in range(STEPS):
        run.step()
    wanted = {name: own.clone() for name, (_, own) in run.held().items()}
    told = told_of(run)
    for _ in range(STEPS):
        run.step()
    return wanted, {name: own.clone() for name, (_, own) in run.held().items()}, told


def by_ranks(names: list[str]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name in names:
        found.setdefault(ranks_of(name), []).append(name)
    return found


def same_files(one: Path, other: Path) -> None:
    mine, theirs = ({path.name: path.read_bytes() for path in where.iterdir() if path.name != "manifest.json"}
                    for where in (one, other))
    assert mine == theirs


def pairs_are_exact(stored: str, folder: Path, pairs: dict[str, list[str]]) -> None:
    """Save under each mesh that occurs, and load into each that is a key what is named for it."""
    wanted, later, told = alone(stored)
    saved = sorted({source for sources in pairs.values() for source in sources})
    for size, some in by_ranks(saved).items():
        sizes = ranks.run(saves, size, str(folder), some, stored)
        for place, name in enumerate(some):
            path = folder / name / f"step-{STEPS:012}"
            assert verify(path) == [], name
            everything = sum(tensor.nbytes for tensor in Reader(path).tensors.values())
            assert sum(own[place] for own in sizes) == everything, f"{name}: nothing twice, nothing missing"
    for name in saved:
        assert kinds(folder / name) == kinds(folder / saved[0]), f"{name}: the whole model's names, tied ones once"
    for size, some in by_ranks(list(pairs)).items():
        answers = ranks.run(loads, size, str(folder), {name: pairs[name] for name in some}, stored, wanted, later)
        for rank, answer in enumerate(answers):
            for source, one in answer:
                world = ranks_of(source)
                assert one["own"] == (rank if rank < world else 1000 * world + rank % world)
                assert flat({**one, "own": 0}) == flat({**told, "own": 0}), source
        for name in some:
            if name in pairs[name]:
                same_files(folder / name / f"step-{STEPS:012}", folder / f"reading {name}" / f"step-{STEPS:012}")


def kinds(folder: Path) -> dict[str, Any]:
    tensors = Reader(folder / f"step-{STEPS:012}").tensors
    return {name: (kind.dtype, kind.shape) for name, kind in tensors.items() if not name.startswith("rng/")}


def test_under_one_mesh_and_under_others(tmp_path: Path) -> None:
    """Each into itself and into another one, those of two axes into one process too; all pairs are slow."""
    names = list(MESHES)
    pairs_are_exact("ours", tmp_path, {name: [name, (names * 2)[place + 3]] for place, name in enumerate(names)} | {
        "single": [name for name in names if "2 x" in name]})


@pytest.mark.slow
@pytest.mark.parametrize("stored", STORED)
def test_every_mesh_and_every_other(stored: str, tmp_path: Path) -> None:
    """Random draws need names, and torch takes none for groups without parameters."""
    names = [name for name in MESHES if name != "pipeline 4" or stored != "split"]
    pairs_are_exact(stored, tmp_path, dict.fromkeys(names, names))


@pytest.mark.parametrize("stored", ["torch", "split", "adafactor"])
def test_other_optimizers(stored: str, tmp_path: Path) -> None:
    pairs_are_exact(stored, tmp_path, {
        "shard 2 x tensor 2": ["pipeline 2"], "pipeline 2 x tensor 2": ["single", "tensor 2"],
        "single": ["pipeline 2"]})
