"""Stepping each parameter as its gradient arrives."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import generator
from stored import same

from fasttrain import LossScaler
from fasttrain.optim import AdamW


def test_stepping_on_arrival_is_stepping(backend: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    twin = copy.deepcopy(model)
    a, b = AdamW(model.parameters(), backend=backend), AdamW(twin.parameters(), backend=backend)
    arrival = a.step_on_arrival(accumulation=2)
    for step in range(4):
        for half in range(2):
            x = torch.randn(4, 8, generator=generator(2 * step + half))
            model(x).square().mean().backward()
            twin(x).square().mean().backward()
            assert all((p.grad is None) == (half == 1) for p in model.parameters())
        a.step()
        b.step()
        b.zero_grad()
    same([p.detach() for p in model.parameters()], [p.detach() for p in twin.parameters()], "weights")
    with pytest.raises(RuntimeError, match="as their gradients arrive"):
        a.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match="before anything can divide by a loss scale"):
        LossScaler().step(a)
    with pytest.raises(RuntimeError, match="already"):
        a.step_on_arrival()
    arrival.remove()
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="at least 1"):
        a.step_on_arrival(0)
