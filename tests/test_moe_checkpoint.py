"""Experts saved under one mesh go on under another, with the numbers of a run that never ended."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import naive, values
from ranks import run
from test_moe_parallel import CLIP, Model, batch, norm_of, reduce
from torch import nn

from fasttrain.checkpoint import Checkpointer
from fasttrain.dist.mesh import Mesh
from fasttrain.optim import AdamW
from fasttrain.parallel import shard
from fasttrain.parallel.experts import auxiliary, rebalance

OPTIONS: dict[str, Any] = dict(statistics="global", gated=True, router_bias=True)
SAVED, STEPS = 1, 3


def go_on(wire: Any, sizes: dict[str, int], folder: str, steps: range, save: bool) -> Any:
    """Some steps of a run from its newest checkpoint, if there is one; the parameters and biases after them."""
    mesh = Mesh(**sizes)
    model = Model(mesh, **OPTIONS)
    if mesh.sizes["shard"] > 1:
        shard(model, mesh, blocks=[model.mixture])
    optimizer = AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "optimizer": optimizer}
    with Checkpointer(folder, mesh=mesh) as checkpoints:
        if steps.start:
            with torch.no_grad():  # what is loaded is seen
                for p in model.parameters():
                    p.zero_()
            assert checkpoints.load(state).step == steps.start
        for step in steps:
            x = batch(step, 4).chunk(mesh.replicas)[mesh.replica]
            (model(x).pow(2).mean() + auxiliary(model)).backward()
            norm = reduce(model, mesh) if mesh.sizes["shard"] == 1 else torch.stack(
                [p.grad.full_tensor().pow(2).sum() for p in model.parameters()]).sum().sqrt()
            optimizer.clip_grad_norm_(CLIP, norm=norm)
            optimizer.step()
            optimizer.zero_grad()
            rebalance(model, 0.01, mesh)
        if save:
            checkpoints.save(steps.stop, state).wait()
        wire.barrier()
    return values(model), model.mixture.router.bias


def whole() -> Any:
    """By the loop, without a mesh and without an end between."""
    model = Model(None, **OPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    bias = torch.zeros(len(model.mixture.router.weight))
    for step in range(STEPS):
        weights = {name.removeprefix("mixture."): p for name, p in model.named_parameters()}
        x = model.enter(batch(step, 4).flatten(0, 1))
        found = naive(weights, x, activation="silu", bias=bias)
        (model.leave(found.output.relu()).pow(2).mean() + 0.3 * found.balance + 0.02 * found.z).backward()
        assert float(norm_of(model)) > CLIP
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        counts = torch.tensor(found.counts).double()
        bias = bias + 0.01 * torch.sign(counts.mean() - counts).float()
    return values(model), bias


@pytest.mark.parametrize("before, after", [
    (dict(data=2, expert=2), dict(expert=4)), (dict(expert=2, tensor=2), dict(data=1)),
    (dict(data=1), dict(expert=2, tensor=2)),
    pytest.param(dict(expert=4), dict(data=1, shard=2, expert=2), marks=pytest.mark.slow),
    pytest.param(dict(data=1, shard=2, expert=2), dict(data=2, expert=2), marks=pytest.mark.slow)], ids=str)
def test_another_mesh(before: dict[str, int], after: dict[str, int], tmp_path: Path) -> None:
    run(go_on, math.prod(before.values()), {"data": 1, **before}, str(tmp_path), range(SAVED), True)
    answers = run(go_on, math.prod(after.values()), {"data": 1, **after}, str(tmp_path), range(SAVED, STEPS), False)
    wanted, bias = whole()
    for found, moved in answers:
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(moved, bias, rtol=0, atol=0)
