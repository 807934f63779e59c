"""What does not fit is refused on every rank of a mesh in the words of one process; a killed rank leaves what was."""

from __future__ import annotations

import os
import re
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from cutmeshes import Run, mesh_of
from helpers import assert_same_bits
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from fasttrain.checkpoint import Checkpointer, Incomplete, Mismatch, checkpointer, complete, load, load_torch, verify
from fasttrain.checkpoint.place import OnMesh, axes_of
from fasttrain.checkpoint.stages import writers
from fasttrain.dist.mesh import AXES, Mesh

STAGES = "pipeline 2 x tensor 2"


# --- Other models -----------------------------------------------------------------------------------------------------

def one_more(model: nn.Sequential) -> None:
    model.mix.more = nn.Parameter(torch.ones(3, dtype=torch.float64))  # type: ignore[union-attr]


def several_more(model: nn.Sequential) -> None:
    """On both stages."""
    one_more(model)
    model.down.other = nn.Parameter(torch.ones(2, dtype=torch.float64))  # type: ignore[union-attr]
    model.down.register_buffer("counted", torch.ones(()))


def another_shape(model: nn.Sequential) -> None:
    model.norm = nn.LayerNorm(8, dtype=torch.float64)


def untied(model: nn.Sequential) -> None:
    model.head.weight = nn.Parameter(torch.ones(12, 16, dtype=torch.float64))  # type: ignore[union-attr]


ALTERED: dict[str, Callable[[nn.Sequential], None]] = {
    "one more": one_more, "several more": several_more, "another shape": another_shape, "untied": untied}


def saves(wire: Any, folder: str, how: str, name: str) -> None:
    run = Run(mesh_of(name), alter=ALTERED.get(how))
    run.step()
    with Checkpointer(f"{folder}/{how}", mesh=run.mesh) as checkpoints:
        checkpoints.save(1, run.state()).wait()


def refused(wire: Any, folder: str, source: str, how: str, name: str) -> str:
    run = Run(mesh_of(name), alter=ALTERED.get(how), seed=1)
    before = {key: own.clone() for key, (_, own) in run.held().items()}
    with pytest.raises(Mismatch) as raised:
        load(Path(folder, source), run.state(), mesh=run.mesh)
    for key, (_, own) in run.held().items():
        assert_same_bits(own, before[key], f"nothing was changed: {key}")
    return str(raised.value)


@pytest.mark.parametrize("source, how, words", [
    ("as it is", "one more", ["model: missing in the checkpoint: mix.more (3,)",
                              "optimizer: missing in the checkpoint: mix.more (3,)"]),
    ("as it is", "several more", ["model: missing in the checkpoint: ", "mix.more (3,)", "down.other (2,)",
                                  "down.counted ()"]),
    ("several more", "as it is", [
        "model: unexpected, the model has no: down.counted (), down.other (2,), mix.more (3,)",
        "optimizer: unexpected, the optimizer has no: ", "mix.more", "down.other"]),
    ("as it is", "another shape", [
        "model: different: norm.weight (8,) F64 (the checkpoint's is (16,) F64), norm.bias"]),
    ("untied", "as it is", ["model: tied in the model and apart in the checkpoint: embed.weight and head.weight"]),
])
def test_the_same_words_on_every_rank(source: str, how: str, words: list[str], tmp_path: Path) -> None:
    """As one process says them, in another order where several stages have something to say."""
    ranks.run(saves, 1, str(tmp_path), source, "single")
    alone = ranks.run(refused, 1, str(tmp_path), source, how, "single")[0]
    texts = ranks.run(refused, 4, str(tmp_path), source, how, STAGES)
    assert len(set(texts)) == 1
    assert sorted(sorted(re.split(", |: ", line)) for line in texts[0].splitlines()) == sorted(
        sorted(re.split(", |: ", line)) for line in alone.splitlines())
    assert all(word in texts[0] for word in words), texts[0]


def fails_on_one(wire: Any, folder: str) -> tuple[str, str]:
    run = Run(mesh_of(STAGES))
    texts = []
    with Checkpointer(folder, mesh=run.mesh) as checkpoints:
        for rank, state in ((2, {"model": nn.Linear(2, 2, device="meta")}), (1, {3: run.model})):
            with pytest.raises((ValueError, RuntimeError)) as raised:
                checkpoints.save(1, state if wire.rank == rank else {"model": run.model})  # type: ignore[arg-type]
            texts.append(str(raised.value))
        checkpoints.save(3, {"model": run.model}).wait()
    return texts[0], texts[1]


def test_a_state_that_one_rank_cannot_save_is_saved_by_none(tmp_path: Path) -> None:
    texts = ranks.run(fails_on_one, 4, str(tmp_path))
    other = "the state of another rank cannot be saved, and its error says why: nothing is written"
    assert [text[0] == other for text in texts] == [True, True, False, True]
    assert "is on the meta device" in texts[2][0]
    assert [text[1] == other for text in texts] == [True, False, True, True]
    assert texts[1][1] == "3 is no key of a state: give a text without '/'"
    assert [found.step for found in complete(tmp_path)] == [3]
    assert verify(tmp_path) == []


# --- Meshes -----------------------------------------------------------------------------------------------------------

def wrong_meshes(wire: Any, folder: str) -> None:
    torchs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    mesh = Mesh.of(torchs)
    with pytest.raises(TypeError, match=r"is a DeviceMesh: give a fasttrain.parallel.Mesh.*Mesh.of\(device_mesh\)"):
        Checkpointer(folder, mesh=torchs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="both wire= and mesh= are given"):
        Checkpointer(folder, wire=wire, mesh=mesh)
    crossed = DeviceMesh("cpu", torch.tensor([[0, 3], [1, 2]]), mesh_dim_names=("a", "b"))["b"]
    odd = nn.ParameterList([nn.Parameter(DTensor.from_local(torch.ones(2), crossed, [Shard(0)], run_check=False))])
    words = r"model/0: it is cut over the ranks \[\d, \d\], which are not those along some axes of Mesh"
    with Checkpointer(folder, mesh=mesh) as checkpoints, pytest.raises(ValueError, match=words):
        checkpoints.save(1, {"model": odd})


def test_meshes_that_say_nothing_are_refused(tmp_path: Path) -> None:
    ranks.run(wrong_meshes, 4, str(tmp_path))


def along(wire: Any, sizes: dict[str, int]) -> list[tuple[int, ...]]:
    mesh = Mesh(**sizes)
    found = []
    for several in range(64):
        axes = tuple(axis for place, axis in enumerate(AXES) if several >> place & 1)
        long = tuple(axis for axis in axes if mesh.sizes[axis] > 1)
        assert axes_of(mesh, mesh.ranks(*axes)) == long
        among = OnMesh.along(mesh, AXES).beyond(mesh.ranks(*axes))
        rest = mesh.ranks(*[axis for axis in AXES if axis not in long])
        assert (among.count, rest[among.index]) == (len(rest), mesh.rank)
        found.append((among.index, among.count))
    return found


def test_who_holds_the_same_of_what_is_cut() -> None:
    for sizes in (dict(data=2, tensor=2), dict(pipeline=2, expert=2), dict(shard=4)):
        ranks.run(along, 4, sizes)


def test_what_several_stages_hold_is_written_by_the_one_with_least_to_write() -> None:
    stages = {0: {"a": 10, "b": 3, "c": 3}, 1: {"x": 5, "b": 3}, 2: {"b": 3, "c": 3, "y": 1}}
    assert writers(stages) == {"b": 2, "c": 2}
    assert writers({0: {"a": 1}, 1: {"b": 1}}) == {}
    assert writers({1: {"big": 8, "small": 2}, 0: {"big": 8, "small": 2}}) == {"big": 0, "small": 1}


def without_the_mesh(wire: Any, folder: str, stages: bool) -> str:
    """A wire says that all ranks hold the same: stages do not, and of what is cut others hold copies."""
    if stages:
        state = {"model": nn.ModuleDict({f"{wire.rank}": nn.Linear(300, 300, bias=False)})}
    else:
        state = {"model": Run(Mesh(data=2, tensor=2)).model}
    with Checkpointer(folder, wire=wire, staging="none") as checkpoints:
        if wire.rank:
            checkpoints.save(1, state)
            return ""
        with pytest.raises(Incomplete) as raised:
            checkpoints.save(1, state)
    return str(raised.value)


def test_what_is_not_whole_is_not_published(tmp_path: Path) -> None:
    found = ranks.run(without_the_mesh, 2, str(tmp_path / "stages"), True)[0]
    assert "'model/0.weight': the ranks have written 44,032 elements of 90,000; nothing was published" in found
    found = ranks.run(without_the_mesh, 4, str(tmp_path / "copies"), False)[0]
    told = re.search(r"the ranks have written (\S+) elements of (\S+); nothing was published", found)
    assert told is not None, found
    assert int(told[1].replace(",", "")) == 2 * int(told[2].replace(",", "")), "once by each copy"
    assert complete(tmp_path / "stages") == complete(tmp_path / "copies") == []


# --- Files of others --------------------------------------------------------------------------------------------------

def from_torch(wire: Any, path: str, wanted: dict[str, Any]) -> str:
    run = Run(mesh_of("pipeline 2"), seed=1)
    state = {"model": run.model, "optimizer": run.optimizer}
    load_torch(path, state, mesh=run.mesh)
    for name, (_, own) in run.held().items():
        assert_same_bits(own, wanted[name], name)
    run = Run(run.mesh, alter=one_more)
    with pytest.raises(Mismatch) as raised:
        load_torch(path, {"model": run.model, "optimizer": run.optimizer}, mesh=run.mesh)
    return str(raised.value)


def test_a_file_of_torch_is_loaded_by_stages(tmp_path: Path) -> None:
    run = Run(None)
    run.step()
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, tmp_path / "file")
    wanted = {name: own for name, (_, own) in run.held().items()}
    texts = ranks.run(from_torch, 2, str(tmp_path / "file"), wanted)
    assert len(set(texts)) == 1
    assert "model: missing in the checkpoint: mix.more (3,)" in texts[0]


# --- Kills ------------------------------------------------------------------------------------------------------------

def killed(wire: Any, watcher: Any, folder: str) -> None:
    mesh = Mesh(pipeline=2, tensor=2, watch=watcher)
    run = Run(mesh)
    run.step()
    checkpoints = Checkpointer(folder, mesh=mesh, deadline_s=20)
    checkpoints.save(1, run.state()).wait()
    mesh.wire().barrier()
    if wire.rank == 2:
        checkpointer.write_rank = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    run.step()
    checkpoints.save(2, run.state()).wait()
    mesh.wire().barrier()  # nobody ends before the others know


def loads_again(wire: Any, folder: str) -> list[str]:
    wanted, run = Run(mesh_of(STAGES)), Run(mesh_of(STAGES), seed=1)
    wanted.step()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        checkpoints = Checkpointer(folder, mesh=run.mesh)
    loaded = checkpoints.load(run.state())
    assert loaded is not None
    assert (loaded.step, loaded.skipped) == (1, [])
    theirs = wanted.held()
    for name, (_, own) in run.held().items():
        assert_same_bits(own, theirs[name][1], name)
    checkpoints.close()
    return [str(one.message) for one in said]


def test_a_rank_of_a_pipeline_is_killed_in_a_save(tmp_path: Path) -> None:
    """The others end with the cause and publish nothing; the checkpoint before it loads, and what was left goes."""
    ended = ranks.faulty(killed, 4, str(tmp_path))
    assert ended[2].code == -signal.SIGKILL
    assert all(one.code for one in ended)
    assert any("rank 2" in one.text for one in ended)
    assert [found.step for found in complete(tmp_path)] == [1]
    said = ranks.run(loads_again, 4, str(tmp_path))
    assert "removed what an earlier run had left unfinished: .part-2-" in said[0][0]
