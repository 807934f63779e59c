"""Pipelines of which there are several copies, or whose parameters are sharded: one reduction, one norm, one step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipelines import BOUND, Alone, gpt, tokens
from ranks import run
from test_pipeline_use import mean_of_items, sum_and_items
from torch import Tensor

from fasttrain.dist.mesh import Mesh
from fasttrain.optim import AdamW
from fasttrain.parallel import DataParallel, shard
from fasttrain.parallel.pipeline import Pipeline, split, ties
from fasttrain.precision.loss_scale import LossScaler


def close(actual: Any, expected: Any, bound: float = BOUND) -> None:
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def composed(wire: Any, schedule: str, how: str, micro_batches: int, items: bool, tied: bool) -> None:
    """Two pipelines of two ranks; each reads its half of a batch."""
    mesh = Mesh(pipeline=2, **{how: 2}, watch=False)
    alone = Alone(gpt(tied), *([mean_of_items] if items else []))
    stage = split(gpt(tied), mesh, schedule=schedule)
    if how == "data":
        model: Any = DataParallel(stage, mesh=mesh, tied=ties(stage), bucket_cap_mb=0.0005)
    else:
        model = shard(stage, mesh, tied=ties(stage))
    pipeline = Pipeline(model, mesh, sum_and_items if items else alone.loss, micro_batches=micro_batches,
                        scaler=LossScaler(2.0**4))
    optimizer = AdamW(stage.parameters(), lr=0.01)
    sent: list[int] = []
    for step in range(3):
        inputs, targets = tokens(4 * micro_batches, step)
        mine = slice(mesh.replica, None, 2)
        value = pipeline.evaluate(inputs[mine], targets[mine])
        found = pipeline.step(inputs[mine], targets[mine])
        close(found, value)
        loss, norm, grads = alone.step(inputs, targets)
        if not items:
            together = mesh.wire("data", "shard").mean_(found.clone())
            close(together.item(), loss)
            for name, p in stage.named_parameters():
                close(whole(p.grad) / 2.0**4, grads[name])
        close(pipeline.update(optimizer, max_norm=0.5).double(), norm, 1e-6)
        optimizer.zero_grad()
        for name, p in stage.named_parameters():
            close(whole(p.detach()), dict(alone.model.named_parameters(remove_duplicate=False))[name])
        if how == "data":
            sent.append(sum(model.reducer.wire.calls.values()))
            assert model.reducer.sequence == step + 1
    if how == "data":
        buckets = len(model.reducer.buckets)
        assert buckets > 2
        assert len(set(torch.tensor(sent).diff().tolist())) == 1, "as many collectives in every step"


@pytest.mark.parametrize(("schedule", "how", "micro_batches", "items", "tied"), [
    ("1f1b", "data", 2, False, True), ("zbv", "data", 4, True, True), ("interleaved", "data", 4, False, False),
    ("zero-bubble", "data", 2, False, True), ("gpipe", "shard", 2, True, True),
    ("interleaved", "shard", 2, False, True),
    ("zbv", "shard", 4, False, False)])  # in a V what is tied is on one rank, in two units of fully_shard: refused
def test_composed(schedule: str, how: str, micro_batches: int, items: bool, tied: bool) -> None:
    run(composed, 4, schedule, how, micro_batches, items, tied)


def bare(wire: Any) -> str:
    mesh = Mesh(pipeline=2, watch=False)
    with pytest.raises(ValueError, match="wrap what split") as raised:
        Pipeline(split(gpt(), mesh), mesh, mean_of_items, micro_batches=2)
    return str(raised.value)


def test_several_pipelines_need_somebody_to_reduce() -> None:
    assert len(set(run(bare, 4))) == 1
