"""A reducer vouches for gradients that are views of its buckets, and for nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from helpers import assert_same_bits
from torch import nn

from fasttrain.optim import SGD
from fasttrain.parallel import Reducer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.extra, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor, extra: bool) -> torch.Tensor:
        x = self.first(x)
        return self.last(self.extra(x) if extra else x)


def said(wire: Any) -> list[bool]:
    torch.manual_seed(0)
    model = Net()
    reducer = Reducer(model.named_parameters(), wire)
    other = nn.Parameter(torch.ones(3))
    ours = SGD(model.parameters(), lr=0.1, momentum=0.9)
    more, theirs = SGD([*model.parameters(), other], lr=0.1), torch.optim.SGD(model.parameters(), lr=0.1)
    answers = [reducer.vouch(ours)]  # before any backward pass
    for extra in (True, False, True):
        for p in model.parameters():
            p.grad = None
        model(torch.ones(4, 6) * (1 + wire.rank), extra).sum().backward()
        answers.append(reducer.vouch(ours))
        assert (ours.vouched is not None) == answers[-1]
        ours.step()
        assert ours.vouched is None
    answers += [reducer.vouch(more), reducer.vouch(theirs), reducer.vouch(ours)]
    ours.add_param_group({"params": [other]})
    answers.append(reducer.vouch(ours))
    reducer.remove()
    return answers


def test_when() -> None:
    """Where every parameter of the optimizer has its gradient in a bucket."""
    for answers in ranks.run(said, 2):
        assert answers == [False, True, False, True, False, False, True, False]


def trained(wire: Any) -> None:
    ends = []
    for backend in ("triton", "cpu"):
        torch.manual_seed(0)
        model = Net()
        reducer = Reducer(model.named_parameters(), wire)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, backend=backend)
        for step in range(4):
            optimizer.zero_grad()
            model(torch.full((4, 6), 1.0 + wire.rank + step), True).square().sum().backward()
            assert reducer.vouch(optimizer)
            optimizer.step()
            if backend == "triton" and step > 1:  # the first step has other coefficients
                assert optimizer.last_step.bytes_sent == 0, "nothing moved"
        ends.append([p.detach() for p in model.parameters()])
        reducer.remove()
    for got, wanted in zip(*ends, strict=True):
        assert_same_bits(got, wanted, "after training")


def test_steps_are_the_same() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    ranks.run(trained, 2)
