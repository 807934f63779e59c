"""Stage 3 on a mesh of several axes: over tensor-cut parameters, with copies, beside training in one process."""

from __future__ import annotations

from typing import Any

import meshed
import pytest
import ranks
import torch
from meshed import Model, loss_of, parallelized, term_of, tokens_of, whole
from torch.testing import assert_close

from fasttrain.optim import AdamW
from fasttrain.parallel import Mesh, shard

CLOSE = dict(rtol=1e-10, atol=1e-10)


def trained(wire: Any, sizes: dict[str, int], sequence: bool, tied: bool, blocks: str | None) -> None:
    mesh = Mesh(**sizes, watch=False)
    model, alone = parallelized(Model(tied), mesh, sequence), Model(tied)
    if term_of(mesh):  # the parameters of the first rank that holds them count
        with torch.no_grad():
            for p in model.blocks.parameters():
                p.add_(1.0)
    sharded = shard(model, mesh, blocks=blocks)
    params = dict(model.named_parameters())
    for name, p in alone.named_parameters():
        assert_close(whole(params[name].detach()), p.detach(), rtol=0, atol=0)
    ours = AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1, ema_decay=0.5)
    theirs = torch.optim.AdamW(alone.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        accumulate = sharded.accumulate(micros := 1 + step % 2)
        total = torch.zeros((), dtype=torch.float64)
        for micro in range(micros):
            with accumulate():
                loss = loss_of(model, tokens_of(step, term_of(mesh), micro)) / micros
                loss.backward()
                total += loss.detach()
        wanted = meshed.gradients(alone, step, mesh.terms, micros)
        assert_close(sharded.losses(total, stop=float(wire.rank == 1))[0], wanted.double(), **CLOSE)
        assert sharded.losses(total, stop=float(wire.rank == 1))[1] == 1
        for name, p in alone.named_parameters():
            assert_close(whole(params[name].grad), p.grad, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        squares, found = sharded.statistics(ours)
        assert not found
        norm = ours.clip_grad_norm_(0.05)
        assert_close(squares.sqrt().float(), norm, rtol=0, atol=0)
        # 1e-6 is added to the norm by both; torch's is in float64
        reference = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.05)
        assert_close(squares.sqrt(), reference, **CLOSE)
        ours.clip_grad_norm_(0.05, norm=squares.sqrt())
        ours.step()
        theirs.step()
        ours.zero_grad()
    for name, p in alone.named_parameters():
        assert_close(whole(params[name].detach()), p.detach(), **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("sizes", "sequence", "tied", "blocks"), [
    (dict(shard=2), False, True, "blocks"),
    (dict(shard=2, tensor=2), True, False, "blocks"),
    (dict(shard=2, tensor=2), False, True, None),
    (dict(data=2, shard=2), False, False, "blocks"),
    (dict(shard=2, context=2), False, False, "blocks"),
    (dict(data=2, shard=2, tensor=2), True, True, "blocks"),
    pytest.param(dict(shard=4, tensor=2), True, True, "blocks", marks=pytest.mark.slow),
    pytest.param(dict(data=2, shard=2, context=2), False, True, "blocks", marks=pytest.mark.slow),
], ids=str)
def test_trains_as_one_process(sizes: dict[str, int], sequence: bool, tied: bool, blocks: str | None) -> None:
    size = torch.Size([*sizes.values()]).numel()
    ranks.run(trained, size, {"data": 1, **sizes}, sequence, tied, blocks)
