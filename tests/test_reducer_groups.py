"""Every kind of parameter on one mesh: which ranks add up its gradient, that it counts once, and what travels."""

import math

import pytest
import torch
from ranks import run
from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from fasttrain.dist.mesh import Mesh
from fasttrain.optim.local import is_dtensor, local
from fasttrain.parallel import DataParallel
from fasttrain.parallel.tensor.partial import declare


class Kinds(nn.Module):
    """One parameter, or several, of each kind; 5 rows are cut unevenly."""

    def __init__(self, mesh, dtype=torch.float32):
        super().__init__()
        stage, last = mesh.coordinates["pipeline"], mesh.sizes["pipeline"] - 1
        self.plain = nn.Parameter(torch.zeros(3, 7, dtype=dtype))
        tensor, experts = mesh["tensor"], mesh["expert", "tensor"]
        self.columns = self._cut(tensor, (8, 6), [Shard(0)], dtype)
        self.rows = self._cut(tensor, (5, 2), [Shard(0)], dtype)
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
    """Of the whole model: 3x7 plain, 8x6 and 5x2 cut, 9 and 4 declared, 11 copied, experts, a stage each; ties once."""
    cut = 4 * 6 * 2 if len(mesh["expert", "tensor"].shape) == 2 else 0
    return mesh.sizes["pipeline"] * (21 + 48 + 10 + 9 + 4 + 11 + 24 + cut) + 40


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


MESHES = [(2, dict(tensor=2)), (2, dict(expert=2)), (2, dict(context=2)), (2, dict(pipeline=2)), (4, dict(tensor=2)),
          (4, dict(pipeline=2, tensor=2)), (4, dict(expert=2, tensor=2)), (4, dict(data=2, expert=2)),
          (4, dict(shard=2, context=2)), (8, dict(pipeline=2, expert=2, tensor=2)),
          (8, dict(pipeline=2, context=2, data=2)), (8, dict(data=2, shard=2, tensor=2))]


@pytest.mark.parametrize(("size", "sizes"), MESHES, ids=str)
def test_norm_of_ones(size, sizes):
    answers = run(counted, size, sizes, {})
    assert len({outcome for outcome, _ in answers}) == 1


@pytest.mark.parametrize("wire", ["ordered", "bf16", "int8"])
def test_every_wire(wire):
    """With 8-bit codes ones are exact too, as every block's maximum is one."""
    run(counted, 4, dict(expert=2, tensor=2), {"wire": wire, "bucket_cap_mb": 0.001})
