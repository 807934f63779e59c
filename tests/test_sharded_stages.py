"""Stage 3 in the stages of a pipeline, by torch's own schedules: one reduction for each unit and step, one norm."""

from __future__ import annotations

from typing import Any

import onmesh
import pytest
import ranks
import torch
from onmesh import Model, term_of, whole
from onstages import MICROS, Schedule, held, inputs
from torch.distributed.fsdp import FSDPModule
from torch.testing import assert_close

from fasttrain.optim import AdamW
from fasttrain.parallel import Mesh, shard

CLOSE = dict(rtol=1e-10, atol=1e-10)


def trained(wire: Any, sizes: dict[str, int], schedule: str, tied: bool, sequence: bool) -> None:
    mesh = Mesh(data=1, **sizes, watch=False)
    (model, parts), alone = held(mesh, 1 + (schedule == "zero bubble"), tied, sequence), Model(tied)
    name = "embed.weight" if mesh.coordinates["pipeline"] == 0 else "head.weight"
    sharded = shard(model, mesh, blocks="blocks", tied={name: (0, 1)} if tied else None)
    ours = AdamW(model.named_parameters(), lr=1e-2)
    theirs = torch.optim.AdamW(alone.parameters(), lr=1e-2)
    made = Schedule(mesh, schedule, model, parts, sequence)
    known = dict(alone.named_parameters(remove_duplicate=False))
    for step in range(2):
        before = sharded.wire.calls["reduce_scatter"]
        blocks = list(model.blocks)
        with sharded.paused():
            loss = made.step(inputs(step, term_of(mesh)))
            assert sharded.wire.calls["reduce_scatter"] == before
            if step:  # some of the parameters are complete before the others
                for block in blocks:
                    sharded.reduce(block.norm.parameters())
                    assert sharded.wire.calls["reduce_scatter"] == before
                    sharded.reduce([*block.up.parameters(), *block.down.parameters()])
                    before += 1
                    assert sharded.wire.calls["reduce_scatter"] == before
        early = step and len(blocks)
        assert sharded.wire.calls["reduce_scatter"] == before
        sharded.finish()
        units = sum(len(part._get_fsdp_state()._fsdp_param_groups) for part in model.modules()
                    if isinstance(part, FSDPModule))
        assert sharded.wire.calls["reduce_scatter"] - before + early == units
        wanted = onmesh.gradients(alone, step, mesh.terms, MICROS)
        assert_close(sharded.losses(loss)[0], wanted.double(), **CLOSE)
        for name, p in model.named_parameters():
            assert_close(whole(p.grad), known[name].grad, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        squares, _ = sharded.statistics(ours)
        assert_close(squares.sqrt(), torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.05), **CLOSE)
        ours.clip_grad_norm_(0.05, norm=squares.sqrt())
        ours.step()
        theirs.step()
        ours.zero_grad()
    for name, p in model.named_parameters():
        assert_close(whole(p.detach()), known[name].detach(), **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert_close(ours.clip_grad_norm_(1e9).double().square(), torch.tensor(
        float(sum(p.numel() for p in alone.parameters())), dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("sizes", "schedule", "tied", "sequence"), [
    pytest.param(dict(pipeline=2, shard=2), "Schedule1F1B", True, False, marks=pytest.mark.slow),
    (dict(pipeline=2, shard=2), "zero bubble", False, False),
    (dict(pipeline=2, shard=2, tensor=2), "ScheduleGPipe", True, True),
], ids=str)
def test_stages_train_as_one_process(sizes: dict[str, int], schedule: str, tied: bool, sequence: bool) -> None:
    ranks.run(trained, torch.Size([*sizes.values()]).numel(), sizes, schedule, tied, sequence)
