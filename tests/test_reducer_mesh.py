"""Gradients on a mesh of several axes beside one process that has all data: sums, norms, and what travels."""

import pytest
import torch
from ranks import run
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from fasttrain.dist.mesh import Mesh
from fasttrain.optim.local import is_dtensor
from fasttrain.parallel import DataParallel
from fasttrain.parallel.tensor.partial import declare

CLOSE = dict(rtol=1e-10, atol=1e-12)  # float64, in another order of sums


class Block(nn.Module):
    """A norm, and two matrices that a plan cuts; 13 columns are cut unevenly."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 13), nn.Linear(13, 8)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.blocks, self.out = nn.Linear(4, 8), nn.Sequential(Block(), Block()), nn.Linear(8, 3)
        self.scale, self.unused = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(5))

    def forward(self, x):
        return self.out(self.blocks(self.into(x) * self.scale))


def net():
    torch.manual_seed(0)
    return Net().double()


def cut(model, mesh, sequence=None):
    """Cut the matrices over tensor, and for `sequence` positions between them; "declared": what gets addends is."""
    plan = {}
    for at in ("blocks.0", "blocks.1"):
        between = Shard(1) if sequence else Replicate()
        plan |= {f"{at}.up": ColwiseParallel(input_layouts=between, use_local_output=False),
                 f"{at}.down": RowwiseParallel(output_layouts=between)}
        if sequence:
            plan[f"{at}.norm"] = SequenceParallel()
    if sequence:
        plan["into"] = PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1))
        plan["out"] = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate(),
                                         use_local_output=True)
    parallelize_module(model, mesh["tensor"], plan)
    if sequence:
        declare(model.scale)  # a plain parameter, which is used on a part of the positions
    if sequence == "declared":
        for name, p in model.named_parameters():
            if "norm" in name:
                declare(p)
    return model


def batch(step, replica, micro):
    noise = torch.Generator().manual_seed(100 * step + 10 * replica + micro)
    return torch.randn(3, 6, 4, generator=noise, dtype=torch.float64)


def loss_of(model, x):
    return model(x).square().mean()


def same(parallel, whole, what):
    """Every gradient, gathered where it is cut, is that of one process; and the norm."""
    sums = 0.0
    for (name, p), q in zip(parallel.module.named_parameters(), whole.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), (what, name)
        if q.grad is not None:
            assert not is_dtensor(p) or p.grad.placements == p.placements, (what, name)
            full = p.grad.full_tensor() if is_dtensor(p) else p.grad
            torch.testing.assert_close(full, q.grad, **CLOSE, msg=lambda text, name=name: f"{what} {name}: {text}")
            sums += q.grad.square().sum().item()
    torch.testing.assert_close(parallel.reducer.statistics()[0].item(), sums, **CLOSE)
    assert not parallel.reducer.statistics()[1]


def trained(wire, sizes, sequence, options):
    """Several steps: with accumulation, with several synchronised passes, with kept memory; against one process."""
    mesh = Mesh(**sizes)
    whole, parallel = net(), DataParallel(cut(net(), mesh, sequence), mesh=mesh, bucket_cap_mb=0.0005, **options)
    reducer, calls = parallel.reducer, []
    for step in range(4):
        micros = 1 + step % 3
        for micro in range(micros):
            for replica in range(mesh.replicas):
                (loss_of(whole, batch(step, replica, micro)) / mesh.replicas).backward()
            loss = loss_of(parallel, batch(step, mesh.replica, micro))
            if micro + 1 < micros and step != 2:
                with parallel.no_sync():
                    loss.backward()
            else:  # in step 2 each of three backward passes is synchronised
                before = sum(sum(wire.calls.values()) for wire in reducer.reach.everyone)
                reducer.loss = loss.detach()
                parallel.count(10 * mesh.replica + 1)
                loss.backward()
                calls.append(sum(sum(wire.calls.values()) for wire in reducer.reach.everyone) - before)
                same(parallel, whole, f"step {step}, pass {micro}")
        parallel.zero_grad(set_to_none=step != 1)
        whole.zero_grad(set_to_none=step != 1)
    assert reducer.last.tokens == sum(10 * replica + 1 for replica in range(mesh.replicas)) * mesh.sizes["context"]
    assert set(calls) == {sum(plan.world > 1 for plan in reducer.layout.buckets) + 1}
    return reducer.last


@pytest.mark.parametrize(("size", "sizes", "sequence", "options"), [
    (2, dict(tensor=2), None, {}),
    pytest.param(2, dict(tensor=2), "declared", {"wire": "ordered"}, marks=pytest.mark.slow),
    (4, dict(data=2, tensor=2), None, {}),
    (4, dict(data=2, tensor=2), "declared", {}),
    (4, dict(data=2, tensor=2), "settled", {}),
    (4, dict(data=2, tensor=2), "declared", {"wire": "ordered"}),
    pytest.param(8, dict(data=2, context=2, tensor=2), None, {}, marks=pytest.mark.slow),
], ids=str)
def test_data_and_tensor(size, sizes, sequence, options):
    assert len({str(outcome) for outcome in run(trained, size, sizes, sequence, options)}) == 1
