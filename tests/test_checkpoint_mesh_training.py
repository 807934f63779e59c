"""A GPT that trains on meshes, with all that composes there: saved under one, it goes on under others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pipelines
import pytest
import ranks
import torch
from safetensors.torch import load_file

from fasttrain.checkpoint import Checkpointer, Reader, export_dcp, export_safetensors, export_torch, verify
from fasttrain.dist.mesh import Mesh
from fasttrain.optim import AdamW
from fasttrain.parallel import DataParallel, shard
from fasttrain.parallel.pipeline import Pipeline, split, ties
from fasttrain.parallel.tensor import tensor_parallel

SAMPLES, STEPS = 4, 2
MESHES: dict[str, tuple[str, dict[str, int]]] = {  # schedule of the pipeline, if there is one, and sizes
    "single": ("", {}),
    "1f1b 2": ("1f1b", dict(pipeline=2)),
    "interleaved 2": ("interleaved", dict(pipeline=2)),
    "v 2": ("zbv", dict(pipeline=2)),
    "data 2 x tensor 2": ("", dict(data=2, tensor=2)),
    "shard 2 x tensor 2": ("", dict(shard=2, tensor=2)),
    "pipeline 2 x tensor 2": ("1f1b", dict(pipeline=2, tensor=2)),
    "pipeline 2 x data 2": ("1f1b", dict(pipeline=2, data=2)),
    "pipeline 2 x shard 2": ("interleaved", dict(pipeline=2, shard=2)),
}


class Training:
    """The tied GPT of the tests of pipelines, on a mesh."""

    def __init__(self, name: str, seed: int = 3):
        schedule, sizes = MESHES[name]
        self.mesh = Mesh(**sizes) if sizes else None
        self.model: Any = pipelines.gpt(tied=True)
        if seed != 3:
            with torch.no_grad():
                for p in self.model.parameters():
                    p.mul_(-0.5)
        self.owner: Any = self.model
        self.pipeline = None
        if self.mesh is not None:
            tied = None
            if schedule:
                split(self.model, self.mesh, schedule=schedule)
                tied = ties(self.model)
            tensor_parallel(self.model, self.mesh, loss="whole")
            self.owner = shard(self.model, self.mesh, blocks="blocks", tied=tied) if self.mesh.sizes["shard"] > 1 else \
                DataParallel(self.model, mesh=self.mesh, tied=tied)
            if schedule:
                self.pipeline = Pipeline(self.owner, self.mesh, pipelines.entropy, micro_batches=2)
        self.optimizer = AdamW(self.model.named_parameters(), lr=0.01)

    def step(self, number: int) -> float:
        """The mean loss of this rank's samples."""
        inputs, targets = pipelines.tokens(SAMPLES, number)
        if self.mesh is not None:
            each = SAMPLES // self.mesh.replicas
            inputs, targets = (one[each * self.mesh.replica :][:each] for one in (inputs, targets))
        if self.pipeline is not None:
            loss = self.pipeline.step(inputs, targets)
            self.pipeline.update(self.optimizer)
        else:
            loss = pipelines.entropy(self.model(inputs) if self.mesh is None or self.mesh.sizes["shard"] > 1 else
                                     self.owner(inputs), targets)
            loss.backward()
            self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}


def saves(wire: Any, folder: str, names: list[str]) -> None:
    for name in names:
        run = Training(name)
        for number in range(STEPS):
            run.step(number)
        with Checkpointer(f"{folder}/{name}", mesh=run.mesh) as checkpoints:
            checkpoints.save(STEPS, run.state()).wait()


def goes_on(wire: Any, folder: str, pairs: list[tuple[str, str]]) -> list[tuple[list[float], int, int]]:
    found = []
    for source, name in pairs:
        run = Training(name, seed=4)
        with Checkpointer(f"{folder}/reading {name}", mesh=run.mesh) as checkpoints:
            assert checkpoints.load(run.state(), which=Path(folder, source, f"step-{STEPS:012}")) is not None
        losses = [run.step(STEPS + number) for number in range(3)]
        found.append((losses, run.mesh.replica if run.mesh else 0, run.mesh.replicas if run.mesh else 1))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("trained")
    for size in (1, 2, 4):
        ranks.run(saves, size, str(made), [name for name, (_, sizes) in MESHES.items() if size == world(sizes)])
    return made


def world(sizes: dict[str, int]) -> int:
    return int(torch.tensor([1, *sizes.values()]).prod())


def test_losses_go_on_under_other_meshes(folder: Path) -> None:
    names = list(MESHES)
    alone = pipelines.Alone(pipelines.gpt(tied=True))
    wanted = {}
    for number in range(STEPS + 3):
        batch = pipelines.tokens(SAMPLES, number)
        with torch.no_grad():
            wanted[number] = [pipelines.entropy(alone.model(one), other).item()
                              for one, other in zip(*(half.split(1) for half in batch), strict=True)]
        alone.optimizer.zero_grad()
        pipelines.entropy(alone.model(batch[0]), batch[1]).backward()
        alone.optimizer.step()
    for size in (1, 2, 4):
        pairs = [(names[(place + apart) % len(names)], name) for place, name in enumerate(names)
                 if world(MESHES[name][1]) == size for apart in (1, 4)]
        for answer in ranks.run(goes_on, size, str(folder), pairs):
            for (losses, replica, replicas), (source, name) in zip(answer, pairs, strict=True):
                each = SAMPLES // replicas
                for number, loss in enumerate(losses):
                    own = wanted[STEPS + number][each * replica :][:each]
                    assert abs(loss - sum(own) / each) < 1e-10, f"{source} into {name}, step {number}"


def test_each_is_one_whole_model(folder: Path, tmp_path: Path) -> None:
    """Names and shapes are those of one process, tied ones once; and so is what others read."""
    kinds = None
    for name in MESHES:
        path = folder / name / f"step-{STEPS:012}"
        assert verify(path) == []
        with Reader(path) as reader:
            here = {key: (one.dtype, one.shape) for key, one in reader.tensors.items()}
        kinds = kinds or here
        assert here == kinds, name
        export_safetensors(path, tmp_path / f"{name}.safetensors")
        weights = load_file(tmp_path / f"{name}.safetensors")
        model = pipelines.gpt(tied=True)
        assert set(weights) == {key for key, _ in model.named_parameters()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert (missing, unexpected) == (["head.weight"], [])


def test_torch_goes_on_with_a_pipelines_checkpoint(folder: Path, tmp_path: Path) -> None:
    """Parameters are numbered as one process has them, if stages follow one another; names are there where not."""
    for name in ("1f1b 2", "interleaved 2"):
        path = folder / name
        export_torch(path, tmp_path / "all.pt")
        export_dcp(path, tmp_path / name)
        found = torch.load(tmp_path / "all.pt", weights_only=True)
        run = Training("single")
        run.model.load_state_dict(found["model"])
        (group,) = found["optimizer"]["param_groups"]
        names = [key for key, _ in run.model.named_parameters()]
        assert sorted(group["param_names"]) == sorted(names)
        assert (group["param_names"] == names) == (name == "1f1b 2")
