"""Placements that cannot be stepped are named; a write to a shard is seen by autograd."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import ranks
import torch
from fake_link import FakeLink
from shards import placed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from fasttrain.optim import SGD, twin
from fasttrain.optim.placing import place


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
    offloaded = SGD([("w", w)], lr=1.0, offload=True)
    offloaded.step()  # shards that are on the host are stepped there
    assert w.to_local()[0, 0] == -2.0
    with mock.patch.object(twin, "link_of", return_value=FakeLink()), pytest.raises(
            TypeError, match=r"parameter 'w' is a DTensor.*CPUOffloadPolicy"):
        offloaded.step()
    assert w.to_local()[0, 0] == -2.0


def test_what_is_refused_and_what_autograd_sees() -> None:
    ranks.run(refused, 2)
