"""Gradients reduced inside nodes, then across them: equal to the naive mean, to the bits of its order."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from fasttrain.dist import accounting
from fasttrain.dist.fingerprint import DisagreementError
from fasttrain.optim import SGD
from fasttrain.parallel import DataParallel, Reducer, Zero
from fasttrain.parallel.hierarchy import Hierarchical
from fasttrain.parallel.naive import NaiveDataParallel


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(5))
        self.extra, self.unused = nn.Linear(24, 24), nn.Linear(3, 3)
        self.to(dtype)

    def forward(self, x: Tensor, extra: bool) -> Tensor:
        for layer in (*self.layers, self.extra) if extra else self.layers:
            x = x + layer(x).tanh()
        return x


def batch(step: int, rank: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(6, 24, generator=torch.Generator().manual_seed(10 * step + rank)).to(dtype)


def mesh_of(shape: tuple[int, int]) -> Any:
    return init_device_mesh("cpu", shape, mesh_dim_names=("across", "inside"))


def in_order(whole: list[Tensor], shape: tuple[int, int]) -> Tensor:
    """The mean of the ranks' gradients as the rows of the grid, and then its columns, add them."""
    rows = [whole[row * shape[1] : (row + 1) * shape[1]] for row in range(shape[0])]
    return mean([mean(row) for row in rows])


def mean(several: list[Tensor]) -> Tensor:
    total = torch.zeros_like(several[0], dtype=torch.float32)
    for one in several:
        total += one
    return (total * (1 / len(several))).to(several[0].dtype)


def reduced(wire: Any, shape: tuple[int, int], dtype: torch.dtype, bucket_mb: float) -> list[Tensor]:
    fast = DataParallel(Net(dtype), mesh=mesh_of(shape), bucket_cap_mb=bucket_mb, watch=False)
    method = fast.reducer.method
    assert isinstance(method, Hierarchical)
    slow = Net(dtype)
    naive = NaiveDataParallel(slow, wire)
    for step in range(3):
        x, extra = batch(step, wire.rank, dtype), step % 2 == wire.rank % 2  # on some ranks only
        if step == 2:
            with fast.no_sync():
                fast(x, extra).square().mean().backward()
            slow(x, extra).square().mean().backward()
        for model in (fast, slow):
            model(x, extra).square().mean().backward()
        everyone = [None if p.grad is None else wire.all_gather(p.grad) for p in slow.layers.parameters()]
        naive.average_gradients()
        for (name, p), q in zip(fast.named_parameters(), slow.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                error = (p.grad.double() - q.grad.double()).norm() / q.grad.double().norm()
                assert error < 4 * torch.finfo(dtype).eps, (name, error)
                assert all(other.equal(p.grad) for other in wire.all_gather(p.grad.contiguous())), name
        for p, whole in zip(fast.module.layers.parameters(), everyone, strict=True):
            assert whole is not None
            assert p.grad.equal(in_order(whole, shape))
        want = sum(p.grad.double().square().sum() for p in fast.parameters() if p.grad is not None)
        torch.testing.assert_close(fast.grad_norm(), want.sqrt().float(), rtol=1e-6, atol=0)
        assert fast.reducer.last.nonfinite == 0
        if step < 2:
            fast.zero_grad()
            slow.zero_grad()
    elements = sum(bucket.elements for bucket in fast.reducer.layout.buckets)
    assert len(fast.reducer.layout.buckets) > 1 or bucket_mb > 1
    inside, across = accounting.hierarchical_bytes(elements, shape[1], shape[0], dtype.itemsize)
    assert (method.inside.sent, method.across.sent) == (3 * inside, 3 * across)
    assert fast.reducer.bytes_per_step() == inside + across
    return [p.grad for p in fast.module.layers.parameters()]


@pytest.mark.parametrize(("shape", "dtype"), [((2, 2), torch.float32), ((2, 2), torch.bfloat16),
                                              ((1, 2), torch.float32), ((3, 1), torch.float32)], ids=str)
def test_equals_the_naive_mean(shape: tuple[int, int], dtype: torch.dtype) -> None:
    one, *_ = small = ranks.run(reduced, shape[0] * shape[1], shape, dtype, 0.01)
    assert all(p.equal(q) for p, q in itertools.chain(*(zip(one, other, strict=True) for other in small)))
    if dtype == torch.float32 and shape == (2, 2):  # whatever the buckets
        large, *_ = ranks.run(reduced, 4, shape, dtype, 25)
        assert all(p.equal(q) for p, q in zip(one, large, strict=True))


def around(wire: Any) -> None:
    model = DataParallel(Net(torch.float32), mesh=mesh_of((2, 2)), watch=False)
    copy = pickle.loads(pickle.dumps(model))
    assert copy.reducer.method.grid == [[0, 1], [2, 3]]
    for one in (model, copy):
        one(batch(0, wire.rank, torch.float32), True).square().mean().backward()
    assert all(p.grad is q.grad is None or p.grad.equal(q.grad)
               for p, q in zip(model.parameters(), copy.parameters(), strict=True))
    bad = batch(1, wire.rank, torch.float32)
    if wire.rank == 2:
        bad[0] = torch.inf
    model.zero_grad()
    model(bad, True).square().mean().backward()
    assert model.reducer.last.nonfinite
    assert bool(model.reducer.statistics()[1])

    params = list(nn.Linear(3, 2).parameters())
    for words, arguments in (("'bf16' does not go with a mesh of two", dict(mesh=mesh_of((2, 2)), wire="bf16")),
                             ("must ascend", dict(mesh=[[1, 0], [2, 3]])),
                             ("does not consist of", dict(wire=Hierarchical([[0, 1]])))):
        with pytest.raises(ValueError, match=words):
            Reducer(params, watch=False, **arguments)
    with pytest.raises(ValueError, match="a mesh of one dimension"):
        Zero(model, SGD, lr=0.1)
    with pytest.raises(ValueError, match="is no grid"):
        Hierarchical([[0, 1], [2]])
    with pytest.raises(DisagreementError, match="grid"):
        Reducer(params, [[0, 1], [2, 3]] if wire.rank % 2 else [[0, 2], [1, 3]], watch=False)


def test_copies_bad_numbers_and_errors() -> None:
    ranks.run(around, 4)
