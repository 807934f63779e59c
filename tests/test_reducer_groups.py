"""Every kind of parameter on one mesh: which ranks add up its gradient, that it counts once, and what travels."""

import math

import pytest
import torch
from ranks import run
from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from fasttrain.dist.mesh import Mesh
from fasttrain.optim.local import is_dtensor, local
from fasttrain.parallel import DataParallel, Reducer
from fasttrain.parallel.tensor.partial import declare


class Kinds(nn.Module):
    """One parameter, or several, of each kind; 5 rows are cut unevenly, so that buckets differ in size."""

    def __init__(self, mesh, dtype=torch.float32):
        super().__init__()
        stage, last = mesh.coordinates["pipeline"], mesh.sizes["pipeline"] - 1
        self.plain = nn.Parameter(torch.zeros(3, 7, dtype=dtype))
        tensor, experts = mesh["tensor"], mesh["expert", "tensor"]
        self.columns = self._cut(tensor, (8, 6), [Shard(0)], dtype)
        self.rows = self._cut(tensor, (5, 200), [Shard(0)], dtype)  # 3 rows and 2: buckets of two sizes
        self.norm = self._cut(tensor, (9,), [Replicate()], dtype)
        self.bias = nn.Parameter(torch.zeros(4, dtype=dtype))
        declare(self.norm), declare(self.bias)
        self.copied = self._cut(tensor, (11,), [Replicate()], dtype)
        self.experts = self._cut(mesh["expert"], (4, 3, 2), [Shard(0)], dtype)
        if experts.ndim == 2:
            self.cut_experts = self._cut(experts, (4, 6, 2), [Shard(0), Shard(1)], dtype)
        if stage in (0, last):  # tied
            self.ends = self._cut(tensor, (8, 5), [Shard(0)], dtype)

    @staticmethod
    def _cut(mesh, shape, placements, dtype):
        return nn.Parameter(distribute_tensor(torch.zeros(shape, dtype=dtype), mesh, placements))


def parallel_of(mesh, dtype=torch.float32, **options):
    tied = {"ends": (0, mesh.sizes["pipeline"] - 1)} if mesh.sizes["pipeline"] > 1 else {}
    return DataParallel(Kinds(mesh, dtype), mesh=mesh, tied=tied, **options)


def ones(parallel, micros=1):
    """A backward pass after which every element's gradient is one, whatever its group."""
    reducer, total = parallel.reducer, 0.0
    for p, group in zip(parallel.module.parameters(), reducer.reach.group, strict=True):
        held = p
        if is_dtensor(p):
            adds = reducer.reach.groups[group].adds
            held = p.to_local(grad_placements=[Partial() if adds else placement for placement in p.placements])
        total = total + held.sum() * (reducer.reach.carry(group) / micros)
    total.backward()


def elements(mesh):
    """Of the whole model: 3x7 plain, 8x6 and 5x200 cut, 9 and 4 declared, 11 copied, experts, a stage; ties once."""
    cut = 4 * 6 * 2 if len(mesh["expert", "tensor"].shape) == 2 else 0
    return mesh.sizes["pipeline"] * (21 + 48 + 1000 + 9 + 4 + 11 + 24 + cut) + 40


def counted(wire, sizes, options):
    mesh = Mesh(**sizes)
    parallel = parallel_of(mesh, **options)
    reducer = parallel.reducer
    for step in range(3):
        before = sum(sum(wire.calls.values()) for wire in reducer.reach.everyone)
        micros = 1 if "wire" not in options else 2
        for micro in range(micros):
            if micro + 1 < micros:
                with parallel.no_sync():
                    ones(parallel, micros)
            else:
                ones(parallel, micros)
        travelled = sum(sum(wire.calls.values()) for wire in reducer.reach.everyone) - before
        assert travelled == sum(plan.world > 1 for plan in reducer.layout.buckets) + 1 + (sizes.get("pipeline", 1) > 1)
        for name, p in parallel.module.named_parameters():
            assert local(p.grad).eq(1).all(), (name, local(p.grad))
            assert not is_dtensor(p) or p.grad.placements == p.placements, name
        assert reducer.grad_norm().item() == pytest.approx(math.sqrt(elements(mesh)), rel=1e-6)
        ones(parallel)  # a synchronised pass more adds to the means
        assert reducer.statistics()[0].item() == pytest.approx(4 * elements(mesh))
        parallel.zero_grad(set_to_none=step == 0)
    return str(reducer.last._replace(used=[])), reducer.layout.table()


MESHES = [(2, dict(tensor=2)), (4, dict(pipeline=2, tensor=2)), (4, dict(expert=2, tensor=2)),
          (4, dict(data=2, expert=2)), (4, dict(shard=2, context=2)), (8, dict(pipeline=2, expert=2, tensor=2))]
MORE = [(2, dict(expert=2)), (2, dict(context=2)), (2, dict(pipeline=2)), (4, dict(tensor=4)),
        (8, dict(pipeline=2, context=2, data=2)), (8, dict(data=2, shard=2, tensor=2)),
        (8, dict(pipeline=2, data=2, tensor=2)), (8, dict(data=2, expert=2, context=2))]
MESHES += [pytest.param(*more, marks=pytest.mark.slow) for more in MORE]


@pytest.mark.parametrize(("size", "sizes"), MESHES, ids=str)
def test_norm_of_ones(size, sizes):
    answers = run(counted, size, sizes, {})
    assert len({outcome for outcome, _ in answers}) == 1


@pytest.mark.parametrize("wire", ["ordered", "bf16", "int8"])
def test_every_wire(wire):
    """With 8-bit codes ones are exact too, as every block's maximum is one."""
    run(counted, 4, dict(expert=2, tensor=2), {"wire": wire, "bucket_cap_mb": 0.001})


def whole(wire):
    """What was declared to get addends may get the whole gradient all the same: it counts once."""
    mesh = Mesh(data=2, tensor=2)
    norm, scale = (nn.Parameter(distribute_tensor(torch.ones(6), mesh["tensor"], [Replicate()])) for _ in range(2))
    declare(norm), declare(scale)
    reducer = Reducer([("norm", norm), ("scale", scale)], mesh)
    found = []
    for passes in (1, 2):
        for number in range(passes):
            with reducer.no_sync() if number + 1 < passes else torch.enable_grad():
                held = norm.to_local(grad_placements=[Replicate() if number % 2 == 0 else Partial()])
                (held.sum() * (1 + mesh.coordinates["data"]) + scale.to_local().sum()).backward()
        found.append((norm.grad.to_local()[0].item(), scale.grad.to_local()[0].item(), reducer.grad_norm().item() ** 2))
        norm.grad = scale.grad = None
    return found


def test_a_whole_gradient_where_addends_are_declared():
    """1.5 is the mean of 1 and 2; the second pass of the second step gives addends to two ranks: 3 more."""
    for once, twice in run(whole, 4):
        assert once == pytest.approx((1.5, 1.0, 6 * (1.5**2 + 1)))
        assert twice == pytest.approx((4.5, 2.0, 6 * (4.5**2 + 4)))


def several_ties(wire):
    """Two ties that the stages register in another order, of which one stage uses one only, in some steps."""
    mesh = Mesh(pipeline=2)
    first, second = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5))
    names = [("first", first), ("second", second)] if wire.rank == 0 else [("other", second), ("one", first)]
    tied = {names[0][0]: (0, 1), names[1][0]: (0, 1)} if wire.rank == 0 else {"one": (0, 1), "other": (0, 1)}
    reducer = Reducer([*names, ("own", own := nn.Parameter(torch.zeros(2)))], mesh, tied=tied)
    found = []
    for both in (True, False):
        (first * (1 + wire.rank) + (second * 10 if both or wire.rank else 0)).sum().backward()
        if both:
            (own.sum() * 3).backward()
        found.append([None if p.grad is None else p.grad[0].item() for p in (first, second, own)])
        found[-1].append(reducer.statistics()[0].item())
        first.grad = second.grad = own.grad = None
    return found


def test_ties_that_one_stage_names_and_orders_in_another_way():
    """Each stage's own parameter of 2 elements has 3, after a second synchronised pass, which doubles nothing."""
    for answer in run(several_ties, 2):
        assert answer[0] == pytest.approx([3.0, 20.0, 3.0, 5 * 9 + 5 * 400 + 2 * 2 * 9])
        assert answer[1] == [3.0, 10.0, None, pytest.approx(5 * 9 + 5 * 100)]
