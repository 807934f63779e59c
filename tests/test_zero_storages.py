"""Storages under ZeRO on a mesh: pieces of tensor-cut parameters step in the bits of the undivided optimizer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import ranks
import torch
from helpers import assert_same_bits
from onmesh import term_of
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fasttrain.optim import SGD, AdamW, Muon, consolidate
from fasttrain.optim.local import local
from fasttrain.parallel import DataParallel, Mesh, Zero


class Net(nn.Module):
    """`up` is cut by rows, which are whole blocks; `down` by columns, five of which lie here."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.up, self.down = nn.Linear(512, 10), nn.Linear(10, 768)
        self.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def wrapped(mesh: Mesh) -> DataParallel:
    model = Net()
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return DataParallel(model, mesh=mesh, wire="ordered")


def stepped(wire: Any, options: dict[str, Any], stage: int) -> None:
    mesh = Mesh(tensor=2, watch=False)
    model, twin = wrapped(mesh), wrapped(mesh)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ours = Zero(model, AdamW, stage=stage, lr=1e-2, **options)
        said = [str(one.message) for one in told if "keeps fp32 states" in str(one.message)]
        assert len(said) == (options.get("state_dtype") == "int8"), said
        theirs = AdamW(twin.module.named_parameters(), lr=1e-2, **options)
    if options.get("master") == "stochastic":
        starts = {piece.first % 5 for piece in ours._pieces if piece.name == "down.weight"}
        assert mesh.wire().sum_(torch.tensor(float(len(starts) > 1))) > 0, "a piece begins within a row"
    if arrives := stage == 1:
        ours.step_on_arrival()
    for step in range(3):
        x = torch.randn(6, 512, generator=torch.Generator().manual_seed(10 * step + term_of(mesh))).bfloat16()
        for one, optimizer in ((model, ours), (twin, theirs)):
            one(x).float().square().mean().backward()
            if not arrives:
                optimizer.clip_grad_norm_(0.1)
            optimizer.step()
            optimizer.zero_grad()
    for (name, p), q in zip(model.module.named_parameters(), twin.module.parameters(), strict=True):
        assert_same_bits(local(p.detach()), local(q.detach()), name)
    got, wanted = ours.consolidate(to=None)["state"], consolidate(theirs.state_dict())["state"]
    for number, state in wanted.items():
        assert got[number].keys() == state.keys()
        for key, value in state.items():
            assert_same_bits(got[number][key], value, f"{key} of parameter {number}")
    for value, q in zip(ours.full_precision(), theirs.full_precision(), strict=True):
        assert_same_bits(value, q.full_tensor() if hasattr(q, "full_tensor") else q, "in full precision")


@pytest.mark.parametrize(("options", "stage"), [
    (dict(master="stochastic", state_dtype="bf16"), 1),
    (dict(master="split", state_dtype="int8", ema_decay=0.9), 2),
    pytest.param(dict(master="stochastic", state_dtype="int8", state_rounding="stochastic"), 2, marks=pytest.mark.slow),
], ids=str)
def test_pieces_step_as_the_whole(options: dict[str, Any], stage: int) -> None:
    ranks.run(stepped, 4, options, stage)


def refused(wire: Any) -> None:
    mesh = Mesh(data=1, tensor=2, watch=False)
    for cls, words in ((Muon, "Muon does not step every element by itself"), (torch.optim.SGD, "SGD is none of this")):
        with pytest.raises(ValueError, match=rf"up.weight is cut over several ranks, and {words}.*shard\(model"):
            Zero(wrapped(mesh), cls, lr=0.1)
    whole = Mesh(data=2, watch=False)
    model = DataParallel(Net(), mesh=whole)
    optimizer = Zero(model, Muon, lr=0.1)  # on a mesh that cuts nothing
    model(torch.ones(2, 512, dtype=torch.bfloat16)).float().sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="ranks 0 to 1"):
        optimizer.consolidate(to=2)
    alone = Zero(wrapped(mesh), SGD, lr=0.1)
    assert alone.consolidate(to=0 if wire.rank else 1) == {}


def test_what_zero_cannot_divide_is_told() -> None:
    ranks.run(refused, 2)
