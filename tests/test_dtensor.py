"""DTensor parameters: on any placement the step of the whole, element for element, and one norm.

Every rank makes the whole model and runs it itself; what it holds of the sharded run is compared with its part of that.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

import fasttrain.optim
from fasttrain import LossScaler
from fasttrain.optim import SGD, AdamW, convert
from fasttrain.optim.local import is_dtensor, local, parts, place, positions
from fasttrain.precision.draws import full_index
from tests.helpers import assert_same_bits

LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {  # of meshes of four ranks: mesh, placements
    "rows": ((4,), (Shard(0),)),
    "columns": ((4,), (Shard(1),)),
    "copies": ((4,), (Replicate(),)),
    "hybrid": ((2, 2), (Replicate(), Shard(0))),
    "blocks": ((2, 2), (Shard(0), Shard(1))),
    "rows of rows": ((2, 2), (Shard(0), Shard(0))),
    "fully_shard over columns": ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    "strided": ((2, 2), (_StridedShard(0, split_factor=2), Replicate())),
}
SIZES = ((90, 64), (16, 8, 3), (7, 5), (3, 6), (1, 2))  # even, deep, uneven, empty on a rank, empty on three


def placed(value: Tensor, mesh: Any, placements: Any) -> DTensor:
    """A DTensor made of the part that this process holds: nothing is sent."""
    whole = DTensor.from_local(value.clone(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    if not any(isinstance(one, _StridedShard) for one in placements):
        return whole.redistribute(mesh, placements)
    # torch's own definition, not the one under test
    mine = value
    for dim, one in enumerate(placements):
        if not one.is_replicate():
            mine = one._split_tensor(mine, mesh.size(dim), with_padding=False)[0][mesh.get_local_rank(dim)]
    return DTensor.from_local(mine.contiguous(), mesh, placements, run_check=False, shape=value.shape,
                              stride=value.stride())


def gradients(shapes: Any, step: int, dtype: torch.dtype) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=numbers).to(dtype) for shape in shapes]


def assert_same_parts(got: Any, whole: Tensor, what: str) -> None:
    """The local part is what this process would hold of the whole."""
    assert got.shape == whole.shape, what
    pattern = placed(whole.contiguous(), got.device_mesh, got.placements)
    assert_same_bits(local(got.detach()), local(pattern), what)


def compare(ours: Any, theirs: Any, params: Any, wholes: Any, what: str) -> None:
    for i, (p, q) in enumerate(zip(params, wholes, strict=True)):
        assert_same_parts(p, q.detach(), f"{what}: parameter {i}")
        assert ours.state[p].keys() == theirs.state[q].keys()
        for key, value in theirs.state[q].items():
            mine = ours.state[p][key]
            assert is_dtensor(mine) == (value.dim() > 0), f"{what}: {key}"
            if is_dtensor(mine):
                assert mine.placements == p.placements
                assert_same_parts(mine, value, f"{what}: {key} of parameter {i}")
            else:
                assert_same_bits(mine, value, f"{what}: {key}")


ADAM = {"lr": 1e-2}
STOCHASTIC = ("AdamW", torch.bfloat16,
              dict(ADAM, master="stochastic", state_dtype="bf16", state_rounding="stochastic"))
RUNS: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("AdamW", torch.float32, ADAM),
    ("AdamW", torch.float64, dict(ADAM, amsgrad=True)),
    ("SGD", torch.float32, dict(lr=0.1, momentum=0.9, weight_decay=0.1)),
    ("SGD", torch.float32, dict(lr=0.1)),
    ("Lion", torch.bfloat16, dict(lr=1e-3)),
    ("NAdam", torch.float32, ADAM),
    ("ASGD", torch.float32, ADAM),
    ("Adagrad", torch.float32, ADAM),
    ("Rprop", torch.float32, ADAM),
    ("Adan", torch.float32, ADAM),
    ("ScheduleFreeAdamW", torch.float32, ADAM),
    ("AdamW", torch.bfloat16, dict(ADAM, master="split", state_dtype="bf16", ema_decay=0.9)),
    ("AdamW", torch.bfloat16, dict(ADAM, master="fp32", ema_decay=0.9, ema_dtype="bf16")),
    ("AdamW", torch.bfloat16, dict(ADAM, master="kahan")),
    ("AdamW", torch.float16, dict(ADAM, master="kahan", clip_value=0.5)),
    ("Lion", torch.bfloat16, dict(lr=1e-3, master="split8", state_dtype="bf16", zero_gradients=True)),
    STOCHASTIC,
]


def stepped(wire: Any, names: list[str], runs: list[Any], sizes: Any, backend: str | None) -> None:
    for name, (optimizer, dtype, options) in itertools.product(names, runs):
        mesh_shape, placements = LAYOUTS[name]
        what = f"{name}, {optimizer}, {dtype}, {options}"
        mesh = init_device_mesh("cpu", mesh_shape)
        shapes = [size for size in sizes if ("strided" not in name and "fully" not in name) or size[0] % 4 == 0]
        values = gradients(shapes, 0, dtype)
        wholes = [nn.Parameter(value.clone()) for value in values]
        params = [nn.Parameter(placed(value, mesh, placements)) for value in values]
        kind = getattr(fasttrain.optim, optimizer)
        ours, theirs = kind(params, backend=backend, **options), kind(wholes, backend=backend, **options)
        for step in range(4):
            for i, (p, q, grad) in enumerate(zip(params, wholes, gradients(shapes, 1 + step, dtype), strict=True)):
                missing = (i + step) % 4 == 2
                q.grad = None if missing else grad
                p.grad = None if missing else placed(grad, mesh, placements)
            ours._clip = theirs._clip = 0.37 if step == 2 else 1.0
            if step == 3:  # written outside: what is kept beside is made anew
                for p in (*params, *wholes):
                    with torch.no_grad():
                        p.mul_(0.5)
            ours.step()
            theirs.step()
            if options.get("zero_gradients"):
                assert all(local(p.grad).eq(0).all() for p in params if p.grad is not None)
            compare(ours, theirs, params, wholes, f"{what}, step {step}")


@pytest.mark.parametrize("name", LAYOUTS)
def test_shards_are_stepped_as_the_whole(name: str) -> None:
    turn = list(LAYOUTS).index(name)
    ranks.run(stepped, 4, [name], RUNS if name == "rows" else [*RUNS[turn % 3::3], STOCHASTIC], SIZES, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_run_on_every_layout(name: str) -> None:
    ranks.run(stepped, 4, [name], RUNS, SIZES, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_gathers_its_updates(dtype: torch.dtype) -> None:
    """The same bits: every rank orthogonalises the batches of the unsharded run."""
    sizes = ((16, 12), (7, 12), (16, 12), (4, 6, 5), (4,), (1, 2))
    ranks.run(stepped, 4, ["rows", "fully_shard over columns", "copies"], [("Muon", dtype, dict(lr=0.1))], sizes, None)
    ranks.run(stepped, 4, ["blocks", "columns"], [("Muon", dtype, dict(lr=0.1, nesterov=False))], sizes[:4], None)


def test_on_the_reference_backend() -> None:
    ranks.run(stepped, 4, ["blocks"], [RUNS[0], RUNS[-6], STOCHASTIC], SIZES[2:4], "reference")


# --- Where the elements lie -------------------------------------------------------------------------------------------

def located(wire: Any) -> None:
    for mesh_shape, placements in LAYOUTS.values():
        mesh = init_device_mesh("cpu", mesh_shape)
        for size in ((8, 12), (16, 4, 3), (12,), (8, 1), (1, 8)):
            if any(getattr(one, "dim", 0) >= len(size) for one in placements) or (
                    size[0] % 4 and any(isinstance(one, _StridedShard) for one in placements)):
                continue
            index = torch.arange(torch.Size(size).numel()).view(size)
            tensor = placed(index, mesh, placements)
            mine = local(tensor).flatten()
            for dim, held in enumerate(positions(tensor)):
                stride = index.stride(dim)
                assert torch.equal(held, (mine // stride % size[dim]).unique()) or not len(mine)
            found = full_index(place("p", tensor), len(mine), torch.device("cpu"))
            assert torch.equal(found, mine), (placements, size)
            assert parts(tensor) == 4 // max(1, sum(one.is_replicate() for one in placements) * 2) or mesh.ndim == 1


def test_places_and_positions() -> None:
    ranks.run(located, 4)


def refuses_places(wire: Any) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    cube = placed(torch.zeros(4, 4, 4), mesh, (Shard(0), Shard(1)))
    p = nn.Parameter(placed(torch.zeros(4, 4, 4, 4).bfloat16(), mesh, (Shard(1), Shard(2))))
    assert place("p", cube) == (0 + 32 * (wire.rank // 2) + 8 * (wire.rank % 2), 8, 16)
    p.grad = torch.zeros_like(p)
    optimizer = SGD([("odd", p)], lr=0.1, master="stochastic")
    with pytest.raises(ValueError, match=r"parameter 'odd' is placed .*use another master"):
        optimizer.step()
    assert not optimizer.state[p]


def test_a_place_that_cannot_be_told_is_refused() -> None:
    ranks.run(refuses_places, 4)


# --- Block codes ------------------------------------------------------------------------------------------------------

BLOCK_SIZES = {"p0": (64, 128), "p1": (128, 40), "p2": (4096,), "p3": (66, 128), "p4": (3, 2000)}
CUT = {"rows": "p1 p3 p4", "rows of rows": "p1 p3 p4", "fully_shard over columns": "p1", "strided": "p1",
       "hybrid": "p3 p4", "copies": "", "columns": "p0 p1 p3 p4", "blocks": "p0 p1 p3 p4"}


def blocks(wire: Any, dtype: str) -> None:
    for name, cut in CUT.items():
        mesh_shape, placements = LAYOUTS[name]
        mesh = init_device_mesh("cpu", mesh_shape)
        odd = any(isinstance(one, _StridedShard) for one in placements)  # torch does not put these together again
        named = {key: size for key, size in BLOCK_SIZES.items() if all(
            getattr(one, "dim", 0) < len(size) for one in placements) and not (odd and size[0] % 4)}
        values = gradients(named.values(), 0, torch.bfloat16)
        wholes = dict(zip(named, (nn.Parameter(value.clone()) for value in values), strict=True))
        params = dict(zip(named, (nn.Parameter(placed(value, mesh, placements)) for value in values), strict=True))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            ours = AdamW(params.items(), lr=1e-2, master="split", state_dtype=dtype)
        assert len(told) == bool(cut), "said once"
        assert [key for key in named if any(f"'{key}'" in str(one.message) for one in told)] == cut.split(), name
        theirs = AdamW([{"params": [(key, q)], "state_dtype": "fp32" if key in cut else dtype}
                        for key, q in wholes.items()], lr=1e-2, master="split")
        for step in range(3):
            grads = gradients(named.values(), 1 + step, torch.bfloat16)
            for p, q, grad in zip(params.values(), wholes.values(), grads, strict=True):
                p.grad, q.grad = placed(grad, mesh, placements), grad
            ours.step()
            theirs.step()
        for key, p in params.items():
            assert_same_parts(p, wholes[key].detach(), f"{name}, {key}")
            for state, value in theirs.state[wholes[key]].items():
                mine = ours.state[p][state]
                if state == "step":
                    assert_same_bits(mine, value)
                else:
                    assert_same_parts(mine, value, f"{name}, {key}: {state}")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_block_codes_where_shards_cut_no_block(dtype: str) -> None:
    """Elsewhere the states are fp32, on every rank alike, and the constructor says so."""
    ranks.run(blocks, 4, dtype)


# --- Norms and flags --------------------------------------------------------------------------------------------------

def norms(wire: Any) -> None:
    for mesh_shape, placements in LAYOUTS.values():
        mesh = init_device_mesh("cpu", mesh_shape)
        params = [nn.Parameter(placed(torch.zeros(size), mesh, placements)) for size in ((8, 12), (16, 4, 3), (4, 4))]
        plain, unused = nn.Parameter(torch.zeros(9)), nn.Parameter(placed(torch.zeros(4, 4), mesh, placements))
        for p in params:
            p.grad = placed(torch.ones(p.shape), mesh, placements)
        plain.grad = torch.ones(9)
        count = 9 + sum(p.numel() for p in params)
        optimizer = SGD([*params, plain, unused], lr=1.0)
        for norm_type in (2.0, 1.0, float("inf")):
            wanted = 1.0 if norm_type == float("inf") else count ** (1 / norm_type)
            got = optimizer.clip_grad_norm_(1e9, norm_type)
            assert type(got) is Tensor
            assert got.item() == pytest.approx(wanted, rel=1e-6), (placements, norm_type)
        assert not optimizer.grad_statistics()[1]
        copies = any(one.is_replicate() for one in placements)  # these have it all
        if wire.rank == 3 or copies:  # the flag reaches every rank
            local(params[1].grad).view(-1)[-1:] = float("nan")
        assert optimizer.grad_statistics()[1], placements


def test_a_norm_counts_every_element_once() -> None:
    ranks.run(norms, 4)


def skips(wire: Any) -> None:
    mesh = init_device_mesh("cpu", (2,))
    params = [nn.Parameter(placed(value, mesh, (Shard(0),))) for value in gradients(((6, 4), (1, 4)), 0, torch.float32)]
    optimizer, scaler = AdamW(params, lr=0.1, master="none", ema_decay=0.9), LossScaler(4.0)
    for step, bad in enumerate((False, True, False)):
        for p, grad in zip(params, gradients(((6, 4), (1, 4)), 1 + step, torch.float32), strict=True):
            p.grad = placed(grad, mesh, (Shard(0),))
        if bad and wire.rank == 1:  # which holds nothing of the second parameter
            local(params[0].grad)[0, 0] = float("inf")
        before = [local(p).clone() for p in params]
        scaler.step(optimizer, max_norm=1.0)
        assert optimizer.last_step.skipped == bad
        assert all(torch.equal(local(p), kept) for p, kept in zip(params[:1], before, strict=False)) == bad
        assert optimizer.state[params[0]]["step"].item() == (1, 1, 2)[step]
    assert scaler.get_scale() == 2.0


def test_a_step_is_skipped_on_every_rank() -> None:
    ranks.run(skips, 2)


def gone_on_one_rank(wire: Any) -> None:
    mesh = init_device_mesh("cpu", (2,))
    p, q = (nn.Parameter(placed(torch.ones(4), mesh, (Shard(0),))) for _ in range(2))
    optimizer = SGD([p, q], lr=1.0)
    if wire.rank == 0:
        p.grad = placed(torch.full((4,), 2.0), mesh, (Shard(0),))
    assert optimizer.clip_grad_norm_(1e9).item() == pytest.approx(8**0.5), "half of the gradient, and nothing waits"
    optimizer.step()
    assert local(p).tolist() == ([-1.0, -1.0] if wire.rank == 0 else [1.0, 1.0])


def test_no_gradient_on_one_rank() -> None:
    ranks.run(gone_on_one_rank, 2)


def each_clipped(wire: Any) -> None:
    mesh = init_device_mesh("cpu", (2,))
    values = gradients(((6, 4), (5,)), 0, torch.float32)
    params, wholes = [nn.Parameter(placed(v, mesh, (Shard(0),))) for v in values], [nn.Parameter(v) for v in values]
    ours, theirs = (SGD(some, lr=1.0, clip_each=0.5) for some in (params, wholes))
    for step in range(3):
        for p, q, grad in zip(params, wholes, gradients(((6, 4), (5,)), 1 + step, torch.float32), strict=True):
            p.grad, q.grad = placed(grad, mesh, (Shard(0),)), grad
        ours.step()
        theirs.step()
    for p, q in zip(params, wholes, strict=True):
        torch.testing.assert_close(p.detach().full_tensor(), q.detach(), rtol=1e-6, atol=1e-6)


def test_each_gradient_is_clipped_by_its_whole_norm() -> None:
    ranks.run(each_clipped, 2)


# --- Models -----------------------------------------------------------------------------------------------------------

class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def parallel(mesh: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Linear(12, 7))
    if "tp" in (mesh.mesh_dim_names or ()):
        plan = {"0.norm": SequenceParallel(), "0.up": ColwiseParallel(input_layouts=Shard(1)),
                "0.down": RowwiseParallel(output_layouts=Shard(1))}
        parallelize_module(model[0], mesh["tp"], {key[2:]: one for key, one in plan.items()})
        parallelize_module(model[1], mesh["tp"], RowwiseParallel(input_layouts=Shard(1)))
    if "dp" in (mesh.mesh_dim_names or ()):
        for part in model:
            fully_shard(part, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    return model


def backward(model: nn.Module, step: int, rank: int) -> None:
    numbers = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(3, 8, 12, generator=numbers)
    first = model[0].norm.weight
    if is_dtensor(first) and "tp" in first.device_mesh.mesh_dim_names:  # its part of every sequence
        x = x.chunk(2, dim=1)[first.device_mesh["tp"].get_local_rank()]
    model(x).square().mean().backward()


def trained(wire: Any, axes: dict[str, int], options: dict[str, Any]) -> None:
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    model = parallel(mesh)
    full = {name: p.detach().full_tensor() if is_dtensor(p) else p.detach().clone()
            for name, p in model.named_parameters()}
    wholes = {name: nn.Parameter(value.clone()) for name, value in full.items()}
    ours, theirs = AdamW(model.named_parameters(), **options), AdamW(wholes.items(), **options)
    for step in range(3):
        backward(model, step, wire.rank if axes.keys() == {"dp"} else 0)
        addends = [name for name, p in model.named_parameters() if any(one.is_partial() for one in p.grad.placements)]
        assert ("0.norm.weight" in addends) == (axes.keys() == {"tp"}), addends
        for name, p in model.named_parameters():
            wholes[name].grad = p.grad.full_tensor() if is_dtensor(p.grad) else p.grad
        norm = ours.clip_grad_norm_(0.1)
        torch.testing.assert_close(norm, theirs.clip_grad_norm_(0.1), rtol=1e-6, atol=0.0)
        theirs._clip = ours._clip
        ours.step()
        theirs.step()
        ours.zero_grad()
    params = dict(model.named_parameters())
    compare(ours, theirs, [p for p in params.values() if is_dtensor(p)],
            [wholes[name] for name, p in params.items() if is_dtensor(p)], str(axes))
    if "ema_decay" in options:
        before = {name: local(p).clone() for name, p in params.items()}
        with ours.ema_weights():
            for name, p in params.items():
                if is_dtensor(p):
                    assert_same_parts(p, theirs.state[wholes[name]]["ema"].to(p.dtype), "the average")
        for name, p in params.items():
            assert_same_bits(local(p.detach()), before[name], "afterwards")
        backward(model, 9, 0)  # the next step goes on with what is kept beside the parameters
        for name, p in params.items():
            wholes[name].grad = None if p.grad is None else p.grad.full_tensor() if is_dtensor(p.grad) else p.grad
        ours.step()
        theirs.step()
        compare(ours, theirs, [p for p in params.values() if is_dtensor(p)],
                [wholes[name] for name, p in params.items() if is_dtensor(p)], str(axes))


@pytest.mark.parametrize("axes", [dict(dp=2), dict(tp=2), dict(dp=2, tp=2)], ids=str)
def test_models(axes: dict[str, int]) -> None:
    """fully_shard, parallelize_module, and one over the other; the LayerNorm's gradient is an addend on each rank."""
    ranks.run(trained, torch.Size(axes.values()).numel(), axes, dict(lr=1e-2, ema_decay=0.5))


def around(wire: Any) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    one, other = parallel(mesh), parallel(mesh)
    for p in (one[1].bias, other[1].bias):
        p.requires_grad_(False)
    arriving, usual = (AdamW(list(model[0].parameters()), lr=1e-2) for model in (one, other))
    for model, optimizer in ((one, arriving), (other, usual)):
        optimizer.add_param_group({"params": model[1].parameters(), "lr": 1e-3})
    arriving.step_on_arrival()
    for step in range(3):
        for model, optimizer in ((one, arriving), (other, usual)):
            backward(model, step, wire.rank)
            assert all((p.grad is None) == (optimizer is arriving or not p.requires_grad) for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert_same_bits(local(p.detach()), local(q.detach()))

    twin = copy.deepcopy(usual)
    for p, q in zip(other.parameters(), itertools.chain(*(g["params"] for g in twin.param_groups)), strict=True):
        if p.requires_grad:
            p.grad = torch.ones_like(p)
            q.grad = torch.ones_like(q)
    torch.nn.utils.clip_grad_norm_([p for p in other.parameters() if p.requires_grad], 0.5)
    twin.clip_grad_norm_(0.5)
    usual.step()
    twin.step()
    for p, q in zip(other.parameters(), itertools.chain(*(g["params"] for g in twin.param_groups)), strict=True):
        torch.testing.assert_close(local(p.detach()), local(q.detach()), rtol=1e-6, atol=1e-7)


def test_arrival_groups_frozen_parameters_and_copies() -> None:
    ranks.run(around, 2)


def refused(wire: Any) -> None:
    mesh = init_device_mesh("cpu", (2,))
    addend = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
    addend.grad = torch.zeros_like(addend)
    with pytest.raises(ValueError, match="each process holds an addend"):
        SGD([addend]).step()
    w = nn.Parameter(placed(torch.ones(3, 3), mesh, (Replicate(),)))
    optimizer = SGD([w], lr=1.0)
    loss = (w * w).sum()
    w.grad = torch.ones_like(w)
    optimizer.step()
    w.grad = torch.ones_like(w)
    optimizer.step()  # the plan's own way
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_refused_and_what_autograd_sees() -> None:
    ranks.run(refused, 2)


# --- Checkpoints ------------------------------------------------------------------------------------------------------

STORED: dict[str, dict[str, Any]] = {
    "torch": dict(lr=1e-2),
    "split": dict(lr=1e-2, master="split", state_dtype="bf16", ema_decay=0.9),
    "int8": dict(lr=1e-2, master="kahan", state_dtype="int8"),
}


def stored_model(wire: Any, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Linear(128, 64)).to(dtype)
    if wire.size > 1:
        mesh = init_device_mesh("cpu", (wire.size,))
        for part in (*model, model):
            fully_shard(part, mesh=mesh)
    return model


def advance(model: nn.Module, optimizer: Any, step: int) -> None:
    numbers = torch.Generator().manual_seed(step)
    for p in model.parameters():
        grad = torch.randn(p.shape, generator=numbers).to(p.dtype)
        p.grad = placed(grad, p.device_mesh, p.placements) if is_dtensor(p) else grad
    optimizer.step()


def saves(wire: Any, folder: str, option: str) -> dict[str, Tensor]:
    dtype = torch.float32 if option == "torch" else torch.bfloat16
    model = stored_model(wire, dtype)
    optimizer = AdamW(model.named_parameters(), **STORED[option])
    for step in range(2):
        advance(model, optimizer, step)
    dcp.save({"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)},
             checkpoint_id=folder)
    advance(model, optimizer, 2)
    return {name: p.detach().full_tensor() for name, p in model.named_parameters()}


def loads(wire: Any, folder: str, option: str) -> dict[str, Tensor]:
    dtype = torch.float32 if option == "torch" else torch.bfloat16
    model = stored_model(wire, dtype)
    optimizer = AdamW(model.named_parameters(), **STORED[option])
    weights, state = model.state_dict(), get_optimizer_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    model.load_state_dict(weights)
    set_optimizer_state_dict(model, optimizer, state)
    advance(model, optimizer, 2)
    assert optimizer.state[model[0].weight]["step"].item() == 3
    return {name: p.detach().full_tensor() if is_dtensor(p) else p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("option", STORED)
def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_four(option: str, tmp_path: Any) -> None:
    wanted = ranks.run(saves, 2, str(tmp_path), option)[0]
    for size in (1, 2, 4):
        for got in ranks.run(loads, size, str(tmp_path), option):
            for name, value in wanted.items():
                assert_same_bits(got[name], value, f"{option}, {size} ranks: {name}")


def exchanged(wire: Any) -> None:
    mesh = init_device_mesh("cpu", (2,))
    values = gradients(((6, 4), (5,)), 0, torch.float32)
    params = [[nn.Parameter(placed(v, mesh, (Shard(0),))) for v in values] for _ in range(2)]
    ours, theirs = AdamW(params[0], lr=1e-2), torch.optim.AdamW(params[1], lr=1e-2)

    def advance_both(step: int) -> None:
        for some, optimizer in zip(params, (ours, theirs), strict=True):
            for p, grad in zip(some, gradients(((6, 4), (5,)), step, torch.float32), strict=True):
                p.grad = placed(grad, mesh, (Shard(0),))
            optimizer.step()
        for p, q in zip(*params, strict=True):
            torch.testing.assert_close(local(p.detach()), local(q.detach()), rtol=1e-6, atol=1e-7)
            assert ours.state[p]["exp_avg"].placements == theirs.state[q]["exp_avg"].placements

    advance_both(1)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))  # torch, too, takes the tensors as they are
    advance_both(2)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    advance_both(3)
    narrow = [nn.Parameter(p.detach().bfloat16()) for p in params[0]]
    split = AdamW(narrow, lr=1e-2, master="split", state_dtype="bf16")
    split.load_state_dict(convert(ours.state_dict(), split))
    for p, q in zip(narrow, params[0], strict=True):
        p.grad = torch.ones_like(p)
        moments = split.state[p]["exp_avg"]
        assert_same_bits(local(moments), local(ours.state[q]["exp_avg"]).bfloat16())
        assert moments.placements == p.placements
    split.step()


def test_states_go_to_torch_and_come_back() -> None:
    ranks.run(exchanged, 2)
