"""ZeRO 1 and 2 on a mesh: the states of each group of parameters divided over its ranks, beside one process."""

from __future__ import annotations

from typing import Any

import onmesh
import pytest
import ranks
import torch
from onmesh import Model, loss_of, parallelized, term_of, tokens_of, whole
from torch.testing import assert_close

from fasttrain.checkpoint import Checkpointer
from fasttrain.optim import AdamW
from fasttrain.optim.local import local
from fasttrain.parallel import DataParallel, Mesh, Zero, shard

CLOSE = dict(rtol=1e-10, atol=1e-10)


def close(got: Any, wanted: Any, what: str) -> None:
    assert_close(whole(got), wanted, **CLOSE, msg=lambda text: f"{what}: {text}")


def trained(wire: Any, sizes: dict[str, int], stage: int, sequence: bool, tied: bool, overlap: bool) -> None:
    mesh = Mesh(**sizes, watch=False)
    inside, alone = parallelized(Model(tied), mesh, sequence), Model(tied)
    model = DataParallel(inside, mesh=mesh, bucket_cap_mb=0.005)
    ours = Zero(model, AdamW, stage=stage, overlap=overlap, lr=1e-2, weight_decay=0.1, ema_decay=0.5)
    theirs = AdamW(alone.named_parameters(), lr=1e-2, weight_decay=0.1, ema_decay=0.5)
    params = dict(inside.named_parameters())
    held = sum(piece.numel for piece in ours._pieces)
    everywhere = int(mesh.wire().sum_(torch.tensor(float(held))))
    parts = sum(local(p).numel() if "norm" not in name or not sequence else p.numel() / mesh.sizes["tensor"]
                for name, p in params.items())
    assert everywhere == mesh.wire().sum_(torch.tensor(float(parts))) / mesh.terms
    wires = model.reducer.reach.everyone
    for step in range(3):
        before = sum(one.bytes["reduce_scatter"] for one in wires)
        micros = 1 + step % 2
        for micro in range(micros):
            loss = loss_of(model, tokens_of(step, term_of(mesh), micro)) / micros
            if micro + 1 == micros or step == 1:  # in step 1 both are synchronised, and add up in shards
                loss.backward()
            else:
                with model.no_sync():
                    loss.backward()
        sent = sum(one.bytes["reduce_scatter"] for one in wires) - before
        assert sent == model.reducer.bytes_per_step() / 2 * (2 if step == 1 else 1)  # and as much when they come back
        onmesh.gradients(alone, step, mesh.terms, micros)
        squares, found = ours.grad_statistics()
        assert not found
        reference = torch.nn.utils.get_total_norm([p.grad for p in alone.parameters()])
        close(squares.sqrt(), reference, "the norm")
        assert_close(ours.clip_grad_norm_(0.05), reference.float())
        theirs.clip_grad_norm_(0.05)
        ours._limit, theirs._limit = (squares.sqrt(), 0.05), (reference, 0.05)
        ours.step()
        theirs.step()
        ours.zero_grad()
    ours.gather()
    for name, p in alone.named_parameters():
        close(params[name].detach(), p.detach(), name)
    with ours.ema_weights(), theirs.ema_weights():
        for name, p in alone.named_parameters():
            close(params[name].detach(), p.detach(), f"the average of {name}")
    got, wanted = ours.consolidate(to=None), theirs.state_dict()
    assert got["state"].keys() == wanted["state"].keys()
    for number, state in wanted["state"].items():
        for key, value in state.items():
            close(got["state"][number][key], value, f"{key} of parameter {number}")
    for value, p in zip(ours.full_precision(), alone.parameters(), strict=True):
        close(value, p.detach(), "in full precision")
    resumed(model, ours, theirs, alone, mesh)


def resumed(model: Any, ours: Any, theirs: Any, alone: Any, mesh: Any) -> None:
    """What one process has saved goes on here."""
    ours.load_state_dict(theirs.state_dict())
    ours.load_full_precision([p.detach() for p in alone.parameters()])
    loss_of(model, tokens_of(9, term_of(mesh), 0)).backward()
    onmesh.gradients(alone, 9, mesh.terms, 1)
    ours.step()
    theirs.step()
    ours.gather()
    params = dict(model.module.named_parameters())
    for name, p in alone.named_parameters():
        close(params[name].detach(), p.detach(), f"{name} after loading")


@pytest.mark.parametrize(("sizes", "stage", "sequence", "tied", "overlap"), [
    (dict(data=2, tensor=2), 1, True, False, False),
    (dict(data=2, tensor=2), 2, True, True, True),
    (dict(shard=2, context=2), 2, False, True, False),
    pytest.param(dict(data=2, shard=2, tensor=2), 1, False, True, True, marks=pytest.mark.slow),
    pytest.param(dict(data=4, tensor=2), 2, True, False, False, marks=pytest.mark.slow),
], ids=str)
def test_trains_as_one_process(sizes: dict[str, int], stage: int, sequence: bool, tied: bool, overlap: bool) -> None:
    ranks.run(trained, torch.Size([*sizes.values()]).numel(), {"data": 1, **sizes}, stage, sequence, tied, overlap)


def saved(wire: Any, folder: str, sizes: dict[str, int], stage: int) -> None:
    mesh = Mesh(**sizes, watch=False)
    inside = parallelized(Model(), mesh, True)
    model: Any = DataParallel(inside, mesh=mesh) if stage < 3 else shard(inside, mesh).module
    ours: Any = Zero(model, AdamW, stage=stage, lr=1e-2) if stage < 3 else AdamW(model.named_parameters(), lr=1e-2)
    state = {"model": model, "optimizer": ours}
    with Checkpointer(folder, mesh=mesh) as checkpoints:
        if checkpoints.load(state) is None:
            for step in range(2):
                loss_of(model, tokens_of(step, term_of(mesh), 0)).backward()
                ours.step()
                ours.zero_grad()
            checkpoints.save(2, state).wait()
            return
    alone = Model()
    theirs = AdamW(alone.named_parameters(), lr=1e-2)
    for step in range(3):
        onmesh.gradients(alone, step, 2, 1)
        theirs.step()
    loss_of(model, tokens_of(2, term_of(mesh), 0)).backward()
    ours.step()
    for (name, p), q in zip(inside.named_parameters(), alone.parameters(), strict=True):
        close(p.detach(), q.detach(), f"{name} after loading under {sizes}")


def test_what_was_saved_goes_on_under_other_meshes(tmp_path: Any) -> None:
    ranks.run(saved, 4, str(tmp_path), dict(data=2, tensor=2), 1)
    for sizes, stage in ((dict(data=1, shard=2, tensor=2), 3), (dict(data=1, context=2, tensor=2), 2)):
        ranks.run(saved, 4, str(tmp_path), sizes, stage)
    ranks.run(saved, 2, str(tmp_path), dict(data=2), 2)
