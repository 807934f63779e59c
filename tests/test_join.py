"""Ranks with different numbers of batches."""

import pytest
import ranks
import torch
from torch import nn

from fasttrain.optim import SGD
from fasttrain.parallel import DataParallel


def uneven(wire, by_all, accumulate, make):
    torch.manual_seed(wire.rank)
    model = make(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), wire)
    optimizer = SGD(model.parameters(), lr=0.1)
    noise = torch.Generator().manual_seed(wire.rank)
    with model.join(divide_by_initial_world_size=by_all):
        for batch in range(2 + 3 * wire.rank):
            x = torch.randn(5, 4, generator=noise)
            if accumulate and batch % 2:
                with model.no_sync():
                    model(x).square().mean().backward()
                continue
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.module.state_dict()


def ours(module, wire):
    return DataParallel(module, mesh=wire)


def torchs(module, wire):
    return nn.parallel.DistributedDataParallel(module)


@pytest.mark.parametrize(("by_all", "accumulate"), [(True, False), (False, True)])
def test_as_torch(by_all, accumulate):
    mine = ranks.run(uneven, 2, by_all, accumulate, ours)
    theirs = ranks.run(uneven, 2, by_all, accumulate, torchs)
    for name, value in mine[0].items():
        assert torch.equal(value, mine[1][name]), name
        torch.testing.assert_close(value, theirs[0][name], rtol=1e-5, atol=1e-6)
