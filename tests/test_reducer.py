"""The reducer beside the naive version: gradients equal the mean over ranks, and equal on every rank."""

import pytest
import ranks
import torch
from torch import nn

from fasttrain.parallel import DataParallel
from fasttrain.parallel.naive import NaiveDataParallel


class Net(nn.Module):
    """Tied, unused, branched and mixed."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(11, 24)
        self.body = nn.ModuleList(nn.Linear(24, 24) for _ in range(6))
        self.norm = nn.LayerNorm(24)
        self.extra = nn.Linear(24, 24)
        self.unused = nn.Linear(5, 3)
        self.head = nn.Linear(24, 11, bias=False)
        self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, x, extra=False):
        h = self.embed(x)
        for layer in self.body:
            h = h + layer(h).relu()
        if extra:
            h = h + self.extra(h)
        return self.head(self.norm(h))


def loss_of(model, x, **options):
    return nn.functional.cross_entropy(model(x, **options).float().flatten(0, 1), x.flatten())


def data(step, rank, micro=0):
    noise = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
    return torch.randint(0, 11, (3, 7), generator=noise)


def reduced(wire, options, dtype):
    torch.manual_seed(0)
    fast = DataParallel(Net(dtype), mesh=wire, **options)
    torch.manual_seed(0)
    slow = Net(dtype)
    naive = NaiveDataParallel(slow, wire)
    worst = 0.0
    for step in range(4):
        extra = step % 2 == wire.rank  # on one rank only
        micros = 1 + step % 3
        for micro in range(micros):
            x = data(step, wire.rank, micro)
            if micro + 1 < micros:
                with fast.no_sync():
                    loss_of(fast, x, extra=extra).backward()
            else:
                loss_of(fast, x, extra=extra).backward()
            loss_of(slow, x, extra=extra).backward()
        naive.average_gradients()
        for (name, p), q in zip(fast.module.named_parameters(), slow.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                worst = max(worst, ((p.grad - q.grad).norm() / q.grad.norm()).item())
                assert wire.all_gather(p.grad.contiguous().float())[0].equal(p.grad.float()), name
        want = torch.stack([p.grad.double().square().sum() for p in fast.module.parameters() if p.grad is not None])
        torch.testing.assert_close(fast.grad_norm(), want.sum().sqrt().float(), rtol=1e-5, atol=0)
        fast.zero_grad(set_to_none=step != 1)
        slow.zero_grad()
    return worst, wire.bytes


def ones(wire):
    """All gradients one: the norm is sqrt(N), whatever the layout and the wire, tied parameters counted once."""
    for options in ({}, {"bucket_cap_mb": 0.001}, {"wire": "ordered"}, {"wire": "bf16"}, {"wire": "int8"}):
        model = DataParallel(Net(), mesh=wire, **options)
        params = list(model.parameters())
        sum(p.sum() for p in params).backward()
        assert model.grad_norm().item() == pytest.approx(sum(p.numel() for p in params) ** 0.5, rel=1e-6), options
        model.reducer.remove()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_norm_of_ones(size):
    ranks.run(ones, size)


@pytest.mark.parametrize(("size", "options", "bound"), [
    (2, {"bucket_cap_mb": 0.005}, 1e-6),
    (3, {"wire": "ordered", "bucket_cap_mb": 0.01}, 1e-6),
    (2, {"wire": "int8", "bucket_cap_mb": 0.01}, 0.05),
])
def test_equals_the_naive_version(size, options, bound):
    """Gradients of either kind of zero_grad, the same on every rank; all else is in test_matrix.py."""
    for worst, _ in ranks.run(reduced, size, options, torch.float32):
        assert worst <= bound
