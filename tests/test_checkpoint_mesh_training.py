"""A GPT that trains on meshes, with all that composes there: saved under one, it goes on under others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pipelines
import pytest
import ranks
import torch
from helpers import assert_same_bits
from safetensors.torch import load_file

from fasttrain.checkpoint import Checkpointer, Reader, export_dcp, export_safetensors, export_torch, verify
from fasttrain.dist.mesh import Mesh
from fasttrain.optim import AdamW, convert
from fasttrain.parallel import DataParallel, Zero, shard
from fasttrain.parallel.pipeline import Pipeline, split, ties
from fasttrain.parallel.tensor import tensor_parallel

SAMPLES, STEPS = 4, 2
Losses = tuple[list[float], int, int]
MESHES: dict[str, tuple[str, dict[str, int]]] = {  # schedule of the pipeline, if there is one, or stage of ZeRO
    "single": ("", {}),
    "1f1b 2": ("1f1b", dict(pipeline=2)),
    "v 2": ("zbv", dict(pipeline=2)),
    "data 2 x tensor 2": ("zero 2", dict(data=2, tensor=2)),
    "shard 2 x tensor 2": ("", dict(shard=2, tensor=2)),
    "pipeline 2 x tensor 2": ("1f1b", dict(pipeline=2, tensor=2)),
    "pipeline 2 x data 2": ("1f1b zero 1", dict(pipeline=2, data=2)),
    "pipeline 2 x shard 2": ("interleaved", dict(pipeline=2, shard=2)),
}


class Training:
    """The tied GPT of the tests of pipelines, on a mesh."""

    def __init__(self, name: str, seed: int = 3):
        how, sizes = MESHES[name]
        schedule, _, stage = how.partition("zero")
        schedule = schedule.strip()
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
        self.optimizer: Any = Zero(self.owner, AdamW, stage=int(stage), lr=0.01) if stage else \
            AdamW(self.model.named_parameters(), lr=0.01)

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


def saves(name: str, folder: str) -> None:
    run = Training(name)
    for number in range(STEPS):
        run.step(number)
    with Checkpointer(f"{folder}/{name}", mesh=run.mesh) as checkpoints:
        checkpoints.save(STEPS, run.state()).wait()


def goes_on(source: str, name: str, folder: str) -> Losses:
    """Losses of three steps, and which replica of how many this rank's samples are."""
    run = Training(name, seed=4)
    with Checkpointer(f"{folder}/reading {name}", mesh=run.mesh) as checkpoints:
        assert checkpoints.load(run.state(), which=Path(folder, source, f"step-{STEPS:012}")) is not None
    losses = [run.step(STEPS + number) for number in range(3)]
    return losses, run.mesh.replica if run.mesh else 0, run.mesh.replicas if run.mesh else 1


def works(wire: Any, folder: str, saving: list[str], pairs: list[tuple[str, str]]) -> list[Losses]:
    for name in saving:
        saves(name, folder)
    wire.barrier()
    return [goes_on(source, name, folder) for source, name in pairs]


def of_size(size: int) -> list[str]:
    return [name for name, (_, sizes) in MESHES.items() if math.prod(sizes.values()) == size]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str, Losses]]]:
    """Checkpoints of all meshes, and what came of each as it went on under others, smaller and larger ones."""
    made, found = tmp_path_factory.mktemp("trained"), []
    ranks.run(works, 1, str(made), ["single"], [])
    for size in (2, 4):
        here, before = of_size(size), of_size(size // 2)
        pairs = [(source, name) for place, name in enumerate(here)
                 for source in (here[place - 1], before[place % len(before)])]
        for answer in ranks.run(works, size, str(made), here, pairs):
            found += [(*pair, losses) for pair, losses in zip(pairs, answer, strict=True)]
    pairs = [(name, "single") for name in MESHES]
    found += [(*pair, losses) for pair, losses in zip(pairs, ranks.run(works, 1, str(made), [], pairs)[0], strict=True)]
    return made, found


def test_losses_go_on_under_other_meshes(trained: tuple[Path, list[tuple[str, str, Losses]]]) -> None:
    check(trained[1])


@pytest.mark.slow
def test_losses_go_on_under_every_other_mesh(trained: tuple[Path, list[tuple[str, str, Losses]]]) -> None:
    for size in (2, 4):
        pairs = [(source, name) for name in of_size(size) for source in MESHES]
        for answer in ranks.run(works, size, str(trained[0]), [], pairs):
            check([(*pair, losses) for pair, losses in zip(pairs, answer, strict=True)])


def of_one_process(wire: Any) -> list[list[float]]:
    """For each step the loss of every sample."""
    alone, found = pipelines.Alone(pipelines.gpt(tied=True)), []
    for number in range(STEPS + 3):
        batch = pipelines.tokens(SAMPLES, number)
        with torch.no_grad():
            found.append([pipelines.entropy(alone.model(one), other).item()
                          for one, other in zip(*(half.split(1) for half in batch), strict=True)])
        pipelines.entropy(alone.model(batch[0]), batch[1]).backward()
        alone.optimizer.step()
        alone.optimizer.zero_grad()
    return found


def check(found: list[tuple[str, str, Losses]]) -> None:
    """Each rank's losses are those of one process on the same samples."""
    wanted = ranks.run(of_one_process, 1)[0]
    for source, name, (losses, replica, replicas) in found:
        each = SAMPLES // replicas
        for number, loss in enumerate(losses):
            own = wanted[STEPS + number][each * replica :][:each]
            assert abs(loss - sum(own) / each) < 1e-10, f"{source} into {name}, step {number}"


def test_each_is_one_whole_model(trained: Any, tmp_path: Path) -> None:
    """Names and shapes are those of one process, tied ones once; and so is what others read."""
    kinds = None
    for name in MESHES:
        path = trained[0] / name / f"step-{STEPS:012}"
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


def test_torch_goes_on_with_a_pipelines_checkpoint(trained: Any, tmp_path: Path) -> None:
    """Parameters are numbered as one process has them, also where a rank has several stages."""
    for name in ("1f1b 2", "pipeline 2 x shard 2"):
        path = trained[0] / name
        export_torch(path, tmp_path / "all.pt")
        export_dcp(path, tmp_path / name)
        found = torch.load(tmp_path / "all.pt", weights_only=True)
        run = Training("single")
        run.model.load_state_dict(found["model"])
        (group,) = found["optimizer"]["param_groups"]
        assert group["param_names"] == [key for key, _ in run.model.named_parameters()]
        plain = torch.optim.AdamW(run.model.parameters(), lr=0.01)
        plain.load_state_dict(convert(found["optimizer"], plain))
        run.optimizer.load_state_dict(found["optimizer"])
        for p in run.model.parameters():
            assert_same_bits(plain.state[p]["exp_avg"], run.optimizer.state[p]["exp_avg"], name)
