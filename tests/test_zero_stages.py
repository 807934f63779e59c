"""ZeRO in the stages of a pipeline: states divided within each, also of what several stages have."""

from __future__ import annotations

from typing import Any

import onmesh
import pytest
import ranks
import torch
from helpers import assert_same_bits
from onmesh import Model, term_of, whole
from onstages import MICROS, Schedule, held, inputs
from torch import Tensor, nn
from torch.testing import assert_close

from fasttrain.optim import AdamW
from fasttrain.optim.local import local
from fasttrain.parallel import DataParallel, Mesh, Zero, shard

CLOSE = dict(rtol=1e-10, atol=1e-10)


def trained(wire: Any, sizes: dict[str, int], stage: int, schedule: str, tied: bool, sequence: bool) -> None:
    mesh = Mesh(data=sizes.pop("data", 1), **sizes, watch=False)
    (inside, parts), alone = held(mesh, 1 + (schedule == "zero bubble"), tied, sequence), Model(tied)
    name = "embed.weight" if mesh.coordinates["pipeline"] == 0 else "head.weight"
    model = DataParallel(inside, mesh=mesh, tied={name: (0, 1)} if tied else None)
    ours = Zero(model, AdamW, stage=stage, lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.AdamW(alone.parameters(), lr=1e-2, weight_decay=0.1)
    divided, held_here = mesh.wire("data", "shard", "expert", "context", "tensor").sum_(torch.tensor([
        float(sum(piece.numel for piece in ours._pieces if "norm" not in piece.name)),
        float(sum(local(p).numel() for name, p in inside.named_parameters() if "norm" not in name))]))
    assert divided * mesh.terms == held_here
    made = Schedule(mesh, schedule, inside, parts, sequence)
    known = dict(alone.named_parameters(remove_duplicate=False))
    for step in range(3):
        with model.reducer.paused():
            made.step(inputs(step, term_of(mesh)))
        model.reducer.reduce()
        model.reducer.finish()
        onmesh.gradients(alone, step, mesh.terms, MICROS)
        squares, found = ours.grad_statistics()
        assert not found
        reference = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.05)
        assert_close(squares.sqrt(), reference, **CLOSE)
        ours.clip_grad_norm_(0.05, norm=squares.sqrt())
        ours.step()
        theirs.step()
        ours.zero_grad()
    for name, p in inside.named_parameters():
        assert_close(whole(p.detach()), known[name].detach(), **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    with pytest.raises(RuntimeError, match="Checkpointer"):
        ours.consolidate()


@pytest.mark.parametrize(("sizes", "stage", "schedule", "tied", "sequence"), [
    (dict(pipeline=2, data=2), 1, "Schedule1F1B", True, False),
    pytest.param(dict(pipeline=2, shard=2), 2, "zero bubble", True, False, marks=pytest.mark.slow),
    pytest.param(dict(pipeline=2, data=2, tensor=2), 2, "ScheduleGPipe", True, True, marks=pytest.mark.slow),
], ids=str)
def test_stages_train_as_one_process(sizes: dict[str, int], stage: int, schedule: str, tied: bool,
                                     sequence: bool) -> None:
    ranks.run(trained, torch.Size([*sizes.values()]).numel(), sizes, stage, schedule, tied, sequence)


class End(nn.Module):
    """One end of a tie, by a name of its own."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.register_parameter(name, nn.Parameter(torch.randn(40, 30).bfloat16()))

    def forward(self, x: Tensor) -> Tensor:
        (p,) = self.parameters()
        return (p * x).float().square().sum()


def drawn(wire: Any, how: str) -> None:
    """Copies of a parameter that is rounded at random stay equal, and are what one process has."""
    mesh = Mesh(data=1, pipeline=2, watch=False)
    name = ("embedding", "head")[wire.rank]
    model, alone = End(name), End("embedding")
    options = dict(lr=1e-2, master="stochastic", state_dtype="bf16")
    (p,), (q,) = model.parameters(), alone.parameters()
    owner: Any = None
    if how == "shard":
        owner = shard(model, mesh, tied={name: (0, 1)})
        optimizer: Any = AdamW(model.named_parameters(), **options)
    else:
        wrapped = DataParallel(model, mesh=mesh, tied={name: (0, 1)})
        owner = wrapped.reducer
        optimizer = Zero(wrapped, AdamW, **options) if how == "zero" else AdamW(model.named_parameters(), **options)
    theirs = AdamW(alone.named_parameters(), **options)
    for _ in range(3):
        with owner.paused():
            model(torch.tensor(0.5)).backward()
        owner.reduce()
        owner.finish()
        (2 * alone(torch.tensor(0.5))).backward()
        assert_close(optimizer.clip_grad_norm_(1e9), theirs.clip_grad_norm_(1e9), rtol=1e-6, atol=0)  # counted once
        optimizer.step()
        optimizer.zero_grad()
        theirs.step()
        theirs.zero_grad()
    (p,) = model.parameters()
    assert_same_bits(local(p.detach()), q.detach(), f"{how} on rank {wire.rank}")


@pytest.mark.parametrize("how", ["plain", "zero", "shard"])
def test_copies_are_rounded_alike(how: str) -> None:
    ranks.run(drawn, 2, how)
