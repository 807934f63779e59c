"""Pipelines of sharded models and of ZeRO: the schedule reduces what is complete, and the rest when it is over."""

from __future__ import annotations

from typing import Any

import onmesh
import pytest
import ranks
import torch
from onmesh import Model, term_of, whole
from onstages import MICROS, Held, inputs
from torch import Tensor, nn
from torch.testing import assert_close

from fasttrain.optim import AdamW
from fasttrain.parallel import DataParallel, Mesh, Zero, shard
from fasttrain.parallel.pipeline import Pipeline, split, ties

CLOSE = dict(rtol=1e-10, atol=1e-10)


class Parted(Held):
    def parts(self) -> list[str]:
        return ["embed", "blocks.0", "blocks.1", "head"]


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flip(1).flatten())


def trained(wire: Any, sizes: dict[str, int], stage: int, schedule: str) -> None:
    mesh = Mesh(**sizes, watch=False)
    model: Any = split(Parted(tied=True), mesh, schedule=schedule)
    alone = Model(tied=True)
    if stage == 3:
        owner: Any = shard(model, mesh, blocks="blocks", tied=ties(model))
        ours: Any = AdamW(model.named_parameters(), lr=1e-2)
    else:
        owner = DataParallel(model, mesh=mesh, tied=ties(model))
        ours = Zero(owner, AdamW, stage=stage, lr=1e-2)
    pipeline = Pipeline(owner, mesh, loss_of, schedule, micro_batches=MICROS)
    theirs = torch.optim.AdamW(alone.parameters(), lr=1e-2)
    for step in range(2):
        x = inputs(step, term_of(mesh))
        pipeline.step(x, x)
        onmesh.gradients(alone, step, mesh.terms, MICROS)
        squares, _ = pipeline.statistics(ours)
        assert_close(squares.sqrt(), torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.05), **CLOSE)
        ours.clip_grad_norm_(0.05, norm=squares.sqrt())
        ours.step()
        theirs.step()
        ours.zero_grad()
    known = dict(alone.named_parameters(remove_duplicate=False))
    for name, p in model.named_parameters():
        assert_close(whole(p.detach()), known[name].detach(), **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("sizes", "stage", "schedule"), [
    (dict(data=1, pipeline=2, shard=2), 3, "interleaved"),
    (dict(data=2, pipeline=2), 2, "zero-bubble"),
    pytest.param(dict(data=1, pipeline=2, shard=2), 3, "zero-bubble", marks=pytest.mark.slow),
    pytest.param(dict(data=1, pipeline=2, shard=2), 3, "zbv", marks=pytest.mark.slow),
    pytest.param(dict(data=2, pipeline=2), 1, "1f1b", marks=pytest.mark.slow),
], ids=str)
def test_pipelines_train_as_one_process(sizes: dict[str, int], stage: int, schedule: str) -> None:
    ranks.run(trained, torch.Size([*sizes.values()]).numel(), sizes, stage, schedule)
