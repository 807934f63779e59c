"""Weights of experts under ZeRO: cut along "expert", their gradients the mean over all terms, counted once."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from onmesh import term_of, whole
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing import assert_close

from fasttrain.optim import AdamW
from fasttrain.parallel import DataParallel, Mesh, Zero, shard
from fasttrain.parallel.held import cut

CLOSE = dict(rtol=1e-10, atol=1e-10)
EXPERTS, HIDDEN, WIDTH = 6, 4, 3


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        up = self.up.to_local() if hasattr(self.up, "to_local") else self.up
        return torch.einsum("ehw,nw->neh", up, x).tanh().square().sum()

    def batched(self, x: Tensor) -> Tensor:
        return self.forward(x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, WIDTH), Experts()

    def forward(self, mine: Tensor, of_group: Tensor, batched: bool = False) -> Tensor:
        """This rank's tokens through what every rank has, and those of all ranks along "expert" through the experts."""
        through = self.experts.batched if batched else self.experts
        return self.router(mine).tanh().square().sum() + through(of_group)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.double()

    def forward(self, mine: Tensor, of_group: Tensor, batched: bool = False) -> Tensor:
        return sum((layer(mine, of_group, batched) for layer in self.layers), torch.zeros(()))


def tokens_of(step: int, term: int) -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(100 * step + term), dtype=torch.float64)


def divided(mesh: Mesh) -> Mixture:
    model = Mixture()
    axes = tuple(axis for axis in ("expert", "tensor") if mesh.sizes[axis] > 1)
    placements = [Shard({"expert": 0, "tensor": 1}[axis]) for axis in axes]
    for layer in model.layers:
        layer.experts.up = nn.Parameter(distribute_tensor(layer.experts.up.detach(), mesh[axes], placements))
    return model


def trained(wire: Any, sizes: dict[str, int], stage: int) -> None:
    mesh = Mesh(**sizes, watch=False)
    model, alone = divided(mesh), Mixture()
    if term_of(mesh):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2.0 if mesh.index("data", "shard", "context") else 1.0)
    sharded = shard(model, mesh, blocks="layers") if stage == 3 else DataParallel(model, mesh=mesh)
    params = dict(model.named_parameters())
    assert set(cut("up", params["layers.0.experts.up"])) == {*(("shard",) if stage == 3 else ()), *(
        axis for axis in ("expert", "tensor") if mesh.sizes[axis] > 1)}
    for name, p in alone.named_parameters():
        assert_close(whole(params[name].detach()), p.detach(), rtol=0, atol=0)
    ours: Any = AdamW(model.named_parameters(), lr=1e-2) if stage == 3 else Zero(sharded, AdamW, stage=stage, lr=1e-2)
    theirs = torch.optim.AdamW(alone.parameters(), lr=1e-2)
    group = [mesh.index("data", "shard") * mesh.sizes["expert"] * mesh.sizes["context"]
             + other * mesh.sizes["context"] + mesh.coordinates["context"] for other in range(mesh.sizes["expert"])]
    for step in range(2):
        of_group = torch.cat([tokens_of(step, term) for term in group])
        (model if stage == 3 else sharded)(tokens_of(step, term_of(mesh)), of_group, step == 1).backward()
        alone.zero_grad()
        for term in range(mesh.terms):
            (alone(tokens_of(step, term), tokens_of(step, term)) / mesh.terms).backward()
        for name, p in alone.named_parameters():
            if stage == 3:
                assert_close(whole(params[name].grad), p.grad, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        squares, found = ours.grad_statistics()
        assert not found
        assert_close(squares.sqrt(), torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.1), **CLOSE)
        ours.clip_grad_norm_(0.1, norm=squares.sqrt())
        ours.step()
        theirs.step()
        ours.zero_grad()
    for name, p in alone.named_parameters():
        assert_close(whole(params[name].detach()), p.detach(), **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    assert stage < 3 or sharded.elements == sum(p.numel() // (2 * mesh.sizes["tensor"] if "experts" in name else 1)
                                   for name, p in alone.named_parameters())


@pytest.mark.parametrize(("sizes", "stage"), [
    (dict(data=1, shard=2, expert=2), 3),
    (dict(data=2, shard=1, expert=2), 2),
    pytest.param(dict(data=2, shard=2, expert=2), 3, marks=pytest.mark.slow),
    pytest.param(dict(data=1, shard=2, expert=2, tensor=2), 3, marks=pytest.mark.slow),
    pytest.param(dict(data=1, shard=2, expert=2, tensor=2), 1, marks=pytest.mark.slow),
    pytest.param(dict(data=1, shard=2, expert=2, context=2), 3, marks=pytest.mark.slow)], ids=str)
def test_experts_train_as_one_process(sizes: dict[str, int], stage: int) -> None:
    ranks.run(trained, torch.Size([*sizes.values()]).numel(), sizes, stage)
