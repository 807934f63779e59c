"""Stage 3 on a mesh of several axes: over tensor-cut parameters, with copies, beside training in one process."""

from __future__ import annotations

from typing import Any

import onmesh
import pytest
import ranks
import torch
from onmesh import Model, loss_of, parallelized, term_of, tokens_of, whole
from shards import assert_same_parts, compare, gradients, placed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing import assert_close

from fasttrain.optim import AdamW
from fasttrain.optim.local import local, positions
from fasttrain.parallel import Mesh, shard
from fasttrain.parallel.tensor import partial

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
        wanted = onmesh.gradients(alone, step, mesh.terms, micros)
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
    pytest.param(dict(shard=2), False, True, "blocks", marks=pytest.mark.slow),
    (dict(shard=2, tensor=2), True, False, "blocks"),
    pytest.param(dict(shard=2, tensor=2), False, True, None, marks=pytest.mark.slow),
    pytest.param(dict(data=2, shard=2), False, False, "blocks", marks=pytest.mark.slow),
    (dict(shard=2, context=2), False, False, "blocks"),
    (dict(data=2, shard=2, tensor=2), True, True, "blocks"),
    pytest.param(dict(shard=4, tensor=2), True, True, "blocks", marks=pytest.mark.slow),
    pytest.param(dict(data=2, shard=2, context=2), False, True, "blocks", marks=pytest.mark.slow),
], ids=str)
def test_trains_as_one_process(sizes: dict[str, int], sequence: bool, tied: bool, blocks: str | None) -> None:
    size = torch.Size([*sizes.values()]).numel()
    ranks.run(trained, size, {"data": 1, **sizes}, sequence, tied, blocks)


def stored(wire: Any, options: dict[str, Any]) -> None:
    """The steps of shards are those of the whole, bit by bit, given the same gradients."""
    mesh = Mesh(data=1, shard=2, tensor=2, watch=False)
    model = parallelized(Wide(), mesh, False)
    shard(model, mesh, reduce_dtype=torch.float32)
    blocks = options.get("state_dtype") == "int8"  # of rows, which no cut divides; others keep their states in fp32
    params = {name: p for name, p in model.named_parameters() if "up" in name or ("down" in name and not blocks)}
    wholes = {name: torch.nn.Parameter(whole(p.detach()).clone()) for name, p in params.items()}
    ours, theirs = AdamW(params.items(), **options), AdamW(wholes.items(), **options)
    for step in range(3):
        for (name, p), grad in zip(params.items(), gradients([p.shape for p in params.values()], step, torch.bfloat16),
                                   strict=True):
            p.grad, wholes[name].grad = placed(grad, p.device_mesh, p.placements), grad
        ours.step()
        theirs.step()
    compare(ours, theirs, list(params.values()), list(wholes.values()), str(options))
    if "ema_decay" in options:
        with ours.ema_weights():
            for name, p in params.items():
                assert_same_parts(p, theirs.state[wholes[name]]["ema"].to(p.dtype), "the average")


class Wide(Model):
    """In bfloat16, with rows of whole blocks of states."""

    def __init__(self) -> None:
        super().__init__(dtype=torch.bfloat16)
        for block in self.blocks:
            block.up = torch.nn.Linear(512, 8, bias=False, dtype=torch.bfloat16)
            block.down = torch.nn.Linear(8, 512, dtype=torch.bfloat16)


@pytest.mark.parametrize("options", [
    pytest.param(dict(lr=1e-2, master="split", state_dtype="bf16", ema_decay=0.9), marks=pytest.mark.slow),
    dict(lr=1e-2, master="stochastic", state_dtype="bf16", ema_decay=0.9),
    dict(lr=1e-2, master="fp32", state_dtype="int8"),
], ids=str)
def test_storages_step_as_the_whole(options: dict[str, Any]) -> None:
    ranks.run(stored, 4, options)


def ones(wire: Any, sizes: dict[str, int], sequence: bool) -> None:
    mesh = Mesh(data=1, **sizes, watch=False)
    model = parallelized(Model(), mesh, sequence)
    sharded = shard(model, mesh)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    count = sum(p.numel() for p in Model().parameters())
    assert sharded.statistics(optimizer)[0] == count
    assert optimizer.clip_grad_norm_(1e9) == torch.tensor(float(count)).sqrt()
    with pytest.raises(ValueError, match="the norm 2 of a model"):
        optimizer.clip_grad_norm_(1e9, 1.0)
    if wire.rank == wire.size - 1:
        local(model.blocks[1].up.weight.grad).fill_(float("nan"))
    assert sharded.statistics(optimizer)[1]  # on every rank
    optimizer.zero_grad()
    # Items are counted once, whatever a rank that has the same tells.
    sharded.count(10 + wire.rank)
    loss_of(model, tokens_of(0, term_of(mesh), 0), "sum").backward()
    squares, _ = sharded.statistics(optimizer)
    items = sum(10 + rank for rank in range(wire.size) if mesh.sizes["tensor"] == 1 or rank % 2 == 0)
    norm = sharded.step(optimizer)
    assert_close(norm, (squares.sqrt() * mesh.terms / items).float())
    with pytest.raises(ValueError, match="belong to a model that is divided"):
        AdamW([*model.parameters(), torch.nn.Parameter(torch.ones(2))], lr=0.1).clip_grad_norm_(1.0)


@pytest.mark.parametrize(("sizes", "sequence"), [(dict(shard=2, tensor=2), True), (dict(shard=2, context=2), False)],
                         ids=str)
def test_every_element_counts_once(sizes: dict[str, int], sequence: bool) -> None:
    ranks.run(ones, 4, sizes, sequence)


def refused(wire: Any) -> None:
    mesh = Mesh(shard=1, watch=False)
    for words, given in (
            ("make it with shard=2", (Model(), mesh)),
            ("cut over", (foreign(wire), Mesh(shard=2, watch=False)))):
        with pytest.raises(ValueError, match=words):
            shard(*given)
    cut = Mesh(data=1, tensor=2, watch=False)
    model = Model()
    partial.declare(model.norm.weight)
    with pytest.raises(ValueError, match=r"addends over the tensor axis.*Replicate"):
        shard(model, cut)
    model = Model()
    model.blocks[0].up.weight = torch.nn.Parameter(distribute_tensor(
        model.blocks[0].up.weight.detach(), Mesh(data=1, expert=2, watch=False)["expert"], [Shard(0)]))
    with pytest.raises(ValueError, match=r"blocks.0.up has weights of experts and bias"):
        shard(model, Mesh(shard=2, watch=False))
    with pytest.raises(ValueError, match="is tied across stages"):
        shard(Model(), Mesh(shard=2, watch=False), tied={"head.weight": (0, 1)})


def foreign(wire: Any) -> Any:
    model = Model()
    other = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model.head.weight = torch.nn.Parameter(distribute_tensor(model.head.weight.detach(), other, [Shard(0)]))
    return model


def test_what_cannot_be_sharded_is_told() -> None:
    ranks.run(refused, 2)


def uneven(wire: Any) -> None:
    """Rows that divide over neither axis lie where torch has put them, also where a rank along "tensor" has none."""
    mesh = Mesh(data=1, shard=4, tensor=2, watch=False)
    for rows in (1, 2, 9, 11):
        value = torch.arange(float(rows * 3)).view(rows, 3)
        layer = torch.nn.Linear(3, rows, bias=False)
        layer.weight = torch.nn.Parameter(distribute_tensor(value, mesh["tensor"], [Shard(0)]))
        shard(layer, mesh)
        p: Any = layer.weight
        assert torch.equal(value[positions(p)[0]], local(p.detach())), rows
        assert torch.equal(whole(p.detach()), value), rows


@pytest.mark.slow
def test_uneven_rows_lie_where_they_are_held() -> None:
    ranks.run(uneven, 8)
