"""The naive data parallel: what it computes is one process's gradient of the whole batch."""

import ranks
import torch
from torch import nn

from fasttrain.parallel.naive import NaiveDataParallel


def make(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.BatchNorm1d(3)).double()


def batch():
    generator = torch.Generator().manual_seed(9)
    return torch.randn(12, 5, generator=generator, dtype=torch.float64)


def share_of_batch(wire):
    model = make(seed=wire.rank).eval()  # other weights on each rank, until they are made equal
    parallel = NaiveDataParallel(model, wire)
    mine = batch().chunk(wire.size)[wire.rank]
    model(mine).square().mean().backward()
    parallel.average_gradients()
    return [p.detach() for p in model.parameters()], [p.grad for p in model.parameters()]


def test_gradients_are_those_of_the_whole_batch():
    model = make(seed=0).eval()
    model(batch()).square().mean().backward()
    for size in (1, 2, 3):
        for params, grads in ranks.run(share_of_batch, size):
            for p, ours, theirs in zip(params, model.parameters(), grads, strict=True):
                assert torch.equal(p, ours)
                torch.testing.assert_close(theirs, ours.grad, rtol=1e-12, atol=1e-14)


def partly_used(wire):
    params = [nn.Parameter(torch.ones(3) * (i + 1), requires_grad=i != 3) for i in range(4)]
    params[2].data = params[2].data.bfloat16()
    model = nn.ParameterList(params)
    parallel = NaiveDataParallel(model, wire)
    if wire.rank == 0:
        (params[0].sum() * 4).backward()  # 0 on rank 0 only; 1 on none; 2 on both, in another dtype
    (params[2] * (wire.rank + 1)).sum().backward()
    before = params[2].grad
    parallel.average_gradients()
    assert params[2].grad is before, "a gradient must be replaced in place"
    return [p.grad for p in params]


def test_unused_parameters_and_several_dtypes():
    for grads in ranks.run(partly_used, 2):
        assert grads[0].tolist() == [2.0] * 3
        assert grads[1] is None
        assert grads[2].dtype == torch.bfloat16
        assert grads[2].tolist() == [1.5] * 3
        assert grads[3] is None


def transposed(wire):
    model = nn.ParameterList([nn.Parameter(torch.arange(6.0).view(2, 3).t() + wire.rank)])
    parallel = NaiveDataParallel(model, wire)
    weights = torch.arange(6.0).view(3, 2) * (wire.rank + 1)
    (model[0] * weights).sum().backward()
    parallel.average_gradients()
    return model[0].detach(), model[0].grad


def test_a_transposed_parameter():
    for value, grad in ranks.run(transposed, 2):
        assert torch.equal(value, torch.arange(6.0).view(2, 3).t())
        assert torch.equal(grad, torch.arange(6.0).view(3, 2) * 1.5)
