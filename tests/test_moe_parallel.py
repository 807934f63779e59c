"""A mixture of experts divided over ranks computes what one process does, and sends what the formula says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mixtures import grads, naive, values
from ranks import run
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from fasttrain.dist.mesh import MEAN, Mesh
from fasttrain.optim import AdamW
from fasttrain.parallel import DataParallel, Zero, shard
from fasttrain.parallel.experts import MoE, auxiliary, metrics, rebalance

WIDTH, HIDDEN, EXPERTS, TOKENS, STEPS, CLIP = 6, 8, 4, 5, 3, 0.1


class Model(nn.Module):
    """A mixture between two layers that every rank holds."""

    def __init__(self, mesh: Mesh | None, **options: Any):
        super().__init__()
        torch.manual_seed(4)
        self.enter = nn.Linear(3, WIDTH, dtype=torch.float64)
        self.mixture = MoE(WIDTH, HIDDEN, EXPERTS, mesh=mesh, dtype=torch.float64, balance=0.3, z=0.02, **options)
        self.leave = nn.Linear(WIDTH, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.mixture(self.enter(x)).relu())


def batch(step: int, replicas: int) -> Tensor:
    """Of every replica, by step."""
    return torch.randn(replicas, TOKENS, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def axes_of(p: Tensor) -> tuple[str, ...]:
    """The axes that cut a parameter."""
    return p.device_mesh.mesh_dim_names if isinstance(p, DTensor) else ()


def reduce(model: nn.Module, mesh: Mesh) -> Tensor:
    """The rule for gradients in plain calls, and their norm, each element of each parameter once."""
    squares = torch.zeros((), dtype=torch.float64)
    for p in model.parameters():
        local = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
        mesh.wire(*(axis for axis in MEAN if axis not in axes_of(p)), use="test").sum_(local).div_(mesh.terms)
        square = local.pow(2).sum()
        squares += mesh.wire(*axes_of(p), use="test").sum_(square) if axes_of(p) else square
    return squares.sqrt()


def trained(wire: Any, sizes: dict[str, int], options: dict[str, Any], by: str) -> Any:
    mesh = Mesh(**sizes)
    model = Model(mesh, **options)
    first, parallel = values(model), model
    if by == "reducer":
        parallel = DataParallel(model, mesh=mesh, bucket_cap_mb=0.001)
    elif by == "shard":
        shard(model, mesh, blocks=[model.mixture])
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    found = []
    for step in range(STEPS):
        x = batch(step, mesh.replicas)[mesh.replica]
        loss = parallel(x).pow(2).mean() + auxiliary(parallel)
        loss.backward()
        if by == "shard":  # the optimizer's norm is float32
            norm = torch.stack([grad.pow(2).sum() for grad in grads(model).values()]).sum().sqrt()
        else:
            norm = parallel.reducer.statistics()[0].sqrt() if by == "reducer" else reduce(model, mesh)
        total = mesh.wire(*MEAN, use="test").mean_(loss.detach().clone()) if mesh.terms > 1 else loss.detach()
        found.append((total, norm, grads(model), metrics(model)["mixture"].counts))
        optimizer.clip_grad_norm_(CLIP, norm=norm)
        optimizer.step()
        optimizer.zero_grad()
    return mesh.replica, first, found, values(model), norm_of_ones(parallel, model, optimizer, mesh, by)


def norm_of_ones(parallel: nn.Module, model: nn.Module, optimizer: AdamW, mesh: Mesh, by: str) -> float:
    """Where every gradient is one on every rank."""
    if by == "shard":
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        return float(optimizer.clip_grad_norm_(1.0))
    if by == "reducer":
        sum(whole_sum(p) * mesh.terms / addends(p, mesh) for p in model.parameters()).backward()
        return float(parallel.reducer.statistics()[0].sqrt())
    for p in model.parameters():
        p.grad = torch.ones_like(p) * mesh.terms / addends(p, mesh)
    return float(reduce(model, mesh))


def addends(p: Tensor, mesh: Mesh) -> int:
    """How many ranks' gradients are added up for a parameter."""
    return mesh.count(*(axis for axis in MEAN if axis not in axes_of(p)))


def whole_sum(p: Tensor) -> Tensor:
    return (p.to_local() if isinstance(p, DTensor) else p).sum()


def expected(replicas: int, options: dict[str, Any]) -> Any:
    """By the loop over tokens, each rank's by themselves, and the mean of their losses."""
    model = Model(None, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    known = {key: value for key, value in options.items() if key in ("capacity", "top_k", "score")}
    if options.get("gated"):
        known["activation"] = "silu"
    first, found = values(model), []
    for step in range(STEPS):
        weights = {name.removeprefix("mixture."): p for name, p in model.named_parameters()}
        inputs = [model.enter(x) for x in batch(step, replicas)]
        counts = [naive(weights, x, **known).counts for x in inputs]
        total = [sum(each) for each in zip(*counts, strict=True)] if options.get("statistics") == "global" else None
        losses = []
        for x in inputs:
            y = naive(weights, x, counts=total, **known)
            losses.append(model.leave(y.output.relu()).pow(2).mean() + 0.3 * y.balance + 0.02 * y.z)
        loss = sum(losses) / replicas
        loss.backward()
        found.append((loss.detach(), norm_of(model), grads(model), counts))
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return first, found, values(model), math.sqrt(sum(p.numel() for p in model.parameters()))


def norm_of(model: nn.Module) -> Tensor:
    return torch.stack([p.grad.pow(2).sum() for p in model.parameters()]).sum().sqrt()


def compare(sizes: dict[str, int], options: dict[str, Any], by: str) -> None:
    exact = dict(rtol=1e-10, atol=1e-12)
    answers = run(trained, math.prod(sizes.values()), sizes, options, by)
    replicas = len({replica for replica, *_ in answers})
    first, wanted, last, ones = expected(replicas, options)
    assert all(float(norm) > CLIP for _, norm, *_ in wanted)
    for replica, began, found, ended, of_ones in answers:
        torch.testing.assert_close(began, first, rtol=0, atol=0)
        for step, (loss, norm, grad, counts) in enumerate(found):
            torch.testing.assert_close(loss, wanted[step][0], **exact)
            torch.testing.assert_close(norm, wanted[step][1], **exact)
            torch.testing.assert_close(grad, wanted[step][2], **exact)
            assert counts.tolist() == wanted[step][3][replica]
        torch.testing.assert_close(ended, last, **exact)
        assert of_ones == pytest.approx(ones, rel=1e-6 if by == "shard" else 1e-12)


@pytest.mark.parametrize("sizes, options, by", [
    (dict(expert=2), dict(gated=True, top_k=3), "calls"),
    (dict(data=2, expert=2), dict(statistics="global"), "reducer"),
    (dict(expert=4), dict(capacity=0.75, score="sigmoid"), "reducer"),
    (dict(data=1, expert=2, tensor=2), dict(gated=True, statistics="global"), "reducer"),
    (dict(data=1, expert=2, tensor=2), dict(capacity=1.5, router_bias=True), "calls"),
    (dict(data=1, shard=2, expert=2), dict(gated=True, statistics="global"), "shard"),
    (dict(data=2, tensor=2), dict(top_k=1, capacity=1.0), "reducer")], ids=str)
def test_equals_one_process(sizes: dict[str, int], options: dict[str, Any], by: str) -> None:
    """Losses, norms, gradients and parameters over three clipped steps; a gradient of ones has the norm sqrt(N).

    By our reducer, `shard`, or in plain calls.
    """
    compare(sizes, options, by)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["calls", "reducer", "shard"])
@pytest.mark.parametrize("capacity", [None, 0.75])
@pytest.mark.parametrize("statistics", ["rank", "global"])
@pytest.mark.parametrize("sizes", [dict(data=2, expert=2, tensor=2), dict(data=2, expert=4),
                                   dict(data=1, shard=2, expert=2, tensor=2)], ids=str)
def test_equals_one_process_on_more_meshes(sizes: dict[str, int], statistics: str, capacity: float | None,
                                           by: str) -> None:
    if by == "shard" and "shard" not in sizes:
        sizes = {"shard": sizes["data"], **sizes, "data": 1}
    compare(sizes, dict(statistics=statistics, capacity=capacity, gated=True), by)


def zeroed(wire: Any, sizes: dict[str, int], options: dict[str, Any], stage: int) -> dict[str, Tensor]:
    mesh = Mesh(**sizes)
    model = Model(mesh, **options)
    parallel = DataParallel(model, mesh=mesh, bucket_cap_mb=0.001)
    optimizer = Zero(parallel, AdamW, stage=stage, lr=1e-2, weight_decay=0.1)
    for step in range(STEPS):
        x = batch(step, mesh.replicas)[mesh.replica]
        (parallel(x).pow(2).mean() + auxiliary(parallel)).backward()
        optimizer.clip_grad_norm_(CLIP, norm=parallel.reducer.statistics()[0].sqrt())
        optimizer.step()
        optimizer.zero_grad()
    return values(model)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_states_in_shards(stage: int) -> None:
    """ZeRO divides an expert's states over those that hold a copy of it."""
    options = dict(statistics="global", gated=True)
    last = expected(4, options)[2]
    for found in run(zeroed, 4, dict(data=2, expert=2), options, stage):
        torch.testing.assert_close(found, last, rtol=1e-10, atol=1e-12)


# --- What is sent -----------------------------------------------------------------------------------------------------

def sent(wire: Any, capacity: float | None, top_k: int, again: bool) -> dict[str, Any]:
    mesh = Mesh(data=1, expert=4)
    layer = MoE(WIDTH, HIDDEN, 8, top_k, capacity=capacity, mesh=mesh)
    x = torch.randn(16, WIDTH, requires_grad=True)
    own = mesh.wire("expert", use="experts")
    before = own.calls.copy(), own.bytes.copy()
    output = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
    (output.sum() + auxiliary(layer)).backward()
    return {"calls": own.calls - before[0], "bytes": own.bytes - before[1]}


@pytest.mark.parametrize("capacity, top_k, again", [(None, 8, False), (1.0, 2, False), (None, 8, True), (1.0, 2, True)])
def test_bytes_are_those_of_the_formula(capacity: float | None, top_k: int, again: bool) -> None:
    """Of experts that get alike: four times (e-1)/e of the tokens' features, times top_k. Recomputing sends them the
    way there once more: it ends with the last tensor that backward needs, which the way back brings.
    """
    each = 3 * 16 * top_k * WIDTH * 4 // 4
    for found in run(sent, 4, capacity, top_k, again):
        passes = 6 if again else 4
        rounds = 2 if again else 1
        assert found["calls"]["all_to_all"] == passes
        assert found["bytes"]["all_to_all"] == passes * each
        if capacity is None:  # everybody's counts of 8 experts
            assert (found["calls"]["all_gather"], found["bytes"]["all_gather"]) == (rounds, rounds * 3 * 8 * 8)
        else:  # the number of slots, which only gloo compares
            assert (found["calls"]["all_gather"], found["bytes"]["all_gather"]) == (rounds, rounds * 3 * 8)


# --- Unequal ranks ----------------------------------------------------------------------------------------------------

def unequal(wire: Any, counts: list[int]) -> Any:
    """Ranks with other numbers of tokens; all that there are go to few experts."""
    mesh = Mesh(data=1, expert=len(counts))
    torch.manual_seed(0)
    layer = MoE(WIDTH, HIDDEN, 8, 2, mesh=mesh, dtype=torch.float64, balance=0.3, z=0.02, statistics="global")
    x = spread_out(counts)[wire.rank].requires_grad_()
    output = layer(x)
    extra = auxiliary(layer)
    (output.pow(2).sum() * len(counts) + extra).backward()
    reduce(layer, mesh)
    return x.grad, output.detach(), extra.detach(), grads(layer), layer.experts.up.grad.to_local().shape


def spread_out(counts: list[int]) -> list[Tensor]:
    x = torch.randn(sum(counts), WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(9)) + 2
    return [part.clone() for part in x.split(counts)]


@pytest.mark.parametrize("counts", [[7, 0], [0, 5, 1, 12]], ids=str)
def test_ranks_with_unequal_numbers_of_tokens(counts: list[int]) -> None:
    """Some have none, and some experts get none: the whole is that of one process with all tokens."""
    answers = run(unequal, len(counts), counts)
    torch.manual_seed(0)
    layer = MoE(WIDTH, HIDDEN, 8, 2, dtype=torch.float64)
    weights, x = values(layer), torch.cat(spread_out(counts)).requires_grad_()
    wanted = naive(weights, x)
    assert 0 in wanted.counts
    extra = 0.3 * wanted.balance + 0.02 * wanted.z
    (wanted.output.pow(2).sum() + extra).backward()
    exact = dict(rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat([answer[1] for answer in answers]), wanted.output.detach(), **exact)
    torch.testing.assert_close(torch.cat([answer[0] for answer in answers]) / len(counts), x.grad, **exact)
    torch.testing.assert_close(sum(answer[2] for answer in answers) / len(counts), extra.detach(), **exact)
    for answer in answers:
        for name, grad in answer[3].items():
            torch.testing.assert_close(grad, weights[name].grad, msg=name, **exact)
        assert answer[4] == (8 // len(counts), HIDDEN, WIDTH)


def differing(wire: Any) -> list[str]:
    mesh = Mesh(data=1, expert=2)
    said = []
    for make in (lambda: MoE(WIDTH, HIDDEN, 3, 2, mesh=mesh),
                 lambda: MoE(WIDTH, HIDDEN, 4, 2, capacity=1.0, mesh=mesh)(torch.zeros(4 + 4 * wire.rank, WIDTH))):
        try:
            make()
        except ValueError as error:
            said.append(str(error))
    return said


def test_refusals_on_every_rank() -> None:
    for experts, tokens in run(differing, 2):
        assert "3 experts do not divide over the 2 ranks of the mesh's axis 'expert': give a multiple of 2" in experts
        assert "make [2, 4] slots for each of them, so they have unequal numbers of tokens" in tokens


def others(wire: Any) -> Any:
    """A bias moved by the choices of all; hidden features that do not divide; a model made on meta."""
    mesh = Mesh(data=1, expert=2)
    layer = MoE(WIDTH, HIDDEN, 4, 1, mesh=mesh, router_bias=True)
    layer.router.count(torch.tensor([[4, 0, 0, 0], [0, 3, 0, 1]][wire.rank]))
    rebalance(layer, 0.5, mesh)
    try:
        MoE(WIDTH, 7, 4, mesh=Mesh(data=1, tensor=2))
        said = ""
    except ValueError as error:
        said = str(error)
    with torch.device("meta"):
        away = MoE(WIDTH, HIDDEN, 4, mesh=mesh)
    return layer.router.bias, said, (away.experts.down.shape, away.experts.down.to_local().shape,
                                     away.experts.down.is_meta)


def test_others() -> None:
    for bias, said, made in run(others, 2):
        assert bias.tolist() == [-0.5, -0.5, 0.5, 0.5]
        assert "7 features within an expert do not divide over the 2 ranks of the mesh's axis 'tensor'" in said
        assert made == ((4, WIDTH, HIDDEN), (2, WIDTH, HIDDEN), True)
