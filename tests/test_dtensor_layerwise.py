"""LAMB, LARS and StableAdamW of DTensor parameters: the sums over the whole, whatever holds its parts.

Every rank runs the whole model as well, and compares what it holds of the sharded run with its part of that.
"""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from shards import LAYOUTS, assert_same_parts, backward, gradients, parallel, placed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

from fasttrain.optim import LAMB, LARS, StableAdamW
from fasttrain.optim.local import is_dtensor, local, part_of, shares
from tests.helpers import assert_same_bits, ulp

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SIZES = ((90, 64), (16, 8, 3), (7, 5), (3, 6), (1, 2))  # even, deep, uneven, empty on a rank, empty on three
RUNS: list[tuple[Any, torch.dtype, dict[str, Any]]] = [
    (LAMB, F64, dict(lr=0.1)),
    (LAMB, F32, dict(lr=0.1, clamp=(0.5, 3.0))),
    (LAMB, BF16, dict(lr=0.1)),
    (LARS, F64, dict(lr=0.5, momentum=0.9, weight_decay=0.1, trust_coefficient=0.2)),
    (LARS, F32, dict(lr=0.5, momentum=0.0, trust_coefficient=0.2)),
    (StableAdamW, F64, dict(lr=0.1)),
    (StableAdamW, F32, dict(lr=0.1, maximize=True)),
]


def assert_close_parts(got: Any, whole: Tensor, size: Tensor, what: str) -> None:
    """The local part is that of the whole, but for the order in which the sums were made.

    That changes a sum, of float64 numbers of one sign, by less than 2^-40 of it: a float64 coefficient by as much, and
    a float32 one by one unit in the last place, if it lay between two. The step that it multiplies then differs by a
    unit in the last place of the step, and the parameter by one of its own beside: `size` is that of both.
    """
    mine, wanted = (local(got.detach()), part_of(whole.detach(), got) if shares(got) else whole.detach())
    size = part_of(size, got) if shares(got) else size
    if mine.numel() == 0:
        return
    off = (mine.double() - wanted.double()).abs() / (1e-12 * size.double() if mine.dtype == F64 else
                                                     2 * ulp(size, mine.dtype))
    assert off.max() <= 1.0, f"{what}: {off.max().item():.2f} times the bound"


def compare(ours: Any, theirs: Any, params: Any, wholes: Any, sizes: Any, what: str) -> None:
    for i, (p, q, size) in enumerate(zip(params, wholes, sizes, strict=True)):
        assert_close_parts(p, q, size, f"{what}: parameter {i}")
        assert ours.state[p].keys() == theirs.state[q].keys()
        for key, value in theirs.state[q].items():
            mine = ours.state[p][key]
            assert mine.dtype == value.dtype
            if key == "step":
                assert_same_bits(mine, value)
            elif key == "momentum_buffer":  # it has the rate in it
                assert mine.placements == p.placements
                assert_close_parts(mine, value, size, f"{what}: {key} of parameter {i}")
            else:
                assert mine.placements == p.placements
                assert_same_parts(mine, value, f"{what}: {key} of parameter {i}")


def stepped(wire: Any, names: list[str], runs: list[Any], backend: str | None = None) -> None:
    for name in names:
        mesh_shape, placements = LAYOUTS[name]
        mesh = init_device_mesh("cpu", mesh_shape)
        strided = any(isinstance(one, _StridedShard) for one in placements)
        shapes = [size for size in SIZES if not strided or size[0] % 4 == 0]
        for kind, dtype, options in runs:
            values = gradients(shapes, 0, dtype)
            wholes = [nn.Parameter(value.clone()) for value in values]
            params = [nn.Parameter(placed(value, mesh, placements)) for value in values]
            ours, theirs = kind(params, backend=backend, **options), kind(wholes, backend=backend, **options)
            sizes = [value.double().abs() for value in values]
            for step in range(4):
                for i, (p, q, grad) in enumerate(zip(params, wholes, gradients(shapes, 1 + step, dtype), strict=True)):
                    missing = (i + step) % 4 == 2
                    q.grad = None if missing else grad
                    p.grad = None if missing else placed(grad, mesh, placements)
                old = [q.detach().double().clone() for q in wholes]
                versions = [p._version for p in params]
                ours.step()
                theirs.step()
                assert all((p.grad is None) == (p._version == v) for p, v in zip(params, versions, strict=True))
                # What was there before counts too: a difference of the step before is still in the parameter.
                sizes = [size + (q.detach().double() - before).abs() + (q.detach().double() - before).abs().mean()
                         for size, q, before in zip(sizes, wholes, old, strict=True)]
                compare(ours, theirs, params, wholes, sizes, f"{name}, {kind.__name__}, {dtype}, step {step}")


@pytest.mark.parametrize("name", LAYOUTS)
def test_shards_are_stepped_as_the_whole(name: str) -> None:
    turn = list(LAYOUTS).index(name)
    ranks.run(stepped, 4, [name], RUNS if name == "rows" else RUNS[turn % 3::3])


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_run_on_every_layout(name: str) -> None:
    ranks.run(stepped, 4, [name], RUNS)


def test_on_the_reference_backend() -> None:
    ranks.run(stepped, 4, ["blocks"], RUNS[:5:2], "reference")


# --- Norms ------------------------------------------------------------------------------------------------------------

def ones(wire: Any) -> None:
    for name, (mesh_shape, placements) in LAYOUTS.items():
        mesh = init_device_mesh("cpu", mesh_shape)
        shapes = ((16, 12), (8, 8)) if "strided" in name or "fully" in name else ((16, 12), (9, 10), (1, 3))
        lamb = [nn.Parameter(placed(torch.ones(shape, dtype=F64), mesh, placements)) for shape in shapes]
        lars = [nn.Parameter(placed(torch.ones(shape, dtype=F64), mesh, placements)) for shape in shapes]
        for p in (*lamb, *lars):
            p.grad = torch.ones_like(p)
        # LAMB's update is 1 in every element, and the norm that counts for the parameter is clamped to 1.
        LAMB(lamb, lr=1.0, eps=0.0, weight_decay=0.0, clamp=(1.0, 1.0)).step()
        # LARS divides by the norm of the gradient and 1, of which only the first knows the number of elements.
        LARS(lars, lr=1.0, momentum=0.0, weight_decay=0.0, trust_coefficient=1.0, eps=1.0).step()
        for p, q, shape in zip(lamb, lars, shapes, strict=True):
            norm = torch.Size(shape).numel() ** 0.5
            for tensor, wanted in ((local(p), 1 - 1 / norm), (local(q), 1 - norm / (norm + 1))):
                assert (tensor - wanted).abs().max() < 1e-14 if tensor.numel() else True, (name, shape)


def test_every_element_counts_once() -> None:
    """All weights and gradients 1: the norms are the square root of the number of elements, for any layout."""
    ranks.run(ones, 4)


def collectives(wire: Any) -> None:
    mesh, plane = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    one = [nn.Parameter(placed(value, mesh, (Shard(0),))) for value in gradients(SIZES * 3, 0, F32)]
    other = [nn.Parameter(placed(value, plane, (Replicate(), Shard(0)))) for value in gradients(SIZES, 1, F32)]
    optimizer = LAMB([*one, *other])
    for p in (*one, *other):
        p.grad = torch.ones_like(p)
    with CommDebugMode() as counted:
        optimizer.step()
    assert counted.get_total_counts() == 2, "one for each of two ways to cut, for 20 parameters"
    assert optimizer.last_step.parameters == 20
    assert optimizer.last_step.launches == 2


def test_one_collective_for_all_parameters_of_a_mesh() -> None:
    ranks.run(collectives, 4)


def gone_on_some(wire: Any) -> None:
    mesh = init_device_mesh("cpu", (2,))
    p, q = (nn.Parameter(placed(torch.ones(4, dtype=F64), mesh, (Shard(0),))) for _ in range(2))
    optimizer = LAMB([p, q], lr=1.0, eps=0.0, weight_decay=0.0, clamp=(1.0, 1.0))
    if wire.rank == 0:
        p.grad = placed(torch.ones(4, dtype=F64), mesh, (Shard(0),))
    optimizer.step()  # and nothing waits
    wanted = 1 - 0.5**0.5 if wire.rank == 0 else 1.0
    assert (local(p) - wanted).abs().max() < 1e-14, "the norm of the two elements that are stepped"
    assert local(q).eq(1).all()
    assert not optimizer.state.get(q)


def test_no_gradient_on_one_rank() -> None:
    """A rank without a gradient leaves its part alone, which then does not count."""
    ranks.run(gone_on_some, 2)


# --- Models -----------------------------------------------------------------------------------------------------------

def trained(wire: Any, axes: dict[str, int], kind: Any, options: dict[str, Any]) -> None:
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    model = parallel(mesh)
    wholes = {name: nn.Parameter(p.detach().full_tensor() if is_dtensor(p) else p.detach().clone())
              for name, p in model.named_parameters()}
    ours, theirs = kind(model.named_parameters(), **options), kind(wholes.items(), **options)
    for step in range(3):
        backward(model, step, wire.rank if axes.keys() == {"dp"} else 0)
        for name, p in model.named_parameters():
            wholes[name].grad = p.grad.full_tensor() if is_dtensor(p.grad) else p.grad
        ours.step()
        theirs.step()
        ours.zero_grad()
        for name, p in model.named_parameters():
            got = p.detach().full_tensor() if is_dtensor(p) else p.detach()
            # Three steps, each off by a unit in the last place of a step and of the parameter, both about 1 here.
            torch.testing.assert_close(got, wholes[name].detach(), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(("axes", "kind"), [(dict(dp=2), LAMB), (dict(tp=2), LARS), (dict(dp=2, tp=2), StableAdamW),
                                            (dict(dp=2, tp=2), LAMB)], ids=str)
def test_models(axes: dict[str, int], kind: Any) -> None:
    """fully_shard, parallelize_module, and one over the other; the LayerNorm's gradient is an addend on each rank."""
    ranks.run(trained, torch.Size(axes.values()).numel(), axes, kind, dict(lr=1e-2))


def arrived(wire: Any) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    one, other = parallel(mesh), parallel(mesh)
    arriving, usual = LAMB(one.parameters(), lr=1e-2), LAMB(other.parameters(), lr=1e-2)
    arriving.step_on_arrival()
    for step in range(2):
        for model, optimizer in ((one, arriving), (other, usual)):
            backward(model, step, wire.rank)
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert_same_bits(local(p.detach()), local(q.detach()))


def test_on_arrival() -> None:
    ranks.run(arrived, 2)
