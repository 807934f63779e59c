"""The loss scaler: what it skips, how its scale moves, and what it saves."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from stored import give_gradients, parameters, same, states

from fasttrain import LossScaler
from fasttrain.optim import AdamW


@pytest.mark.parametrize("storage", [{}, {"storage": "6-byte", "ema_decay": 0.9}])
def test_a_skipped_step_changes_nothing(storage: dict[str, Any], backend: str) -> None:
    params = parameters()
    optimizer, scaler = AdamW(params, backend=backend, **storage), LossScaler(2.0**10, growth_interval=2)
    scales = []
    for step in range(6):
        give_gradients(params, step, scale=scaler.get_scale())
        before, kept = [p.detach().clone() for p in params], states(optimizer, params)
        groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
        if step == 3:
            params[1].grad[2] = math.inf
        norm = scaler.step(optimizer, max_norm=1.0)
        scales.append(scaler.get_scale())
        assert optimizer.last_step.skipped == (step == 3)
        if step == 3:
            same([p.detach() for p in params], before, "parameters")
            same(states(optimizer, params), kept, "states")
            assert groups == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        else:
            assert norm.item() == pytest.approx(math.sqrt(sum(p.grad.double().square().sum().item() for p in params))
                                                / (2.0**10 if step < 2 else 2.0**11 if step < 4 else 2.0**10), rel=1e-3)
    assert scales == [2.0**10, 2.0**11, 2.0**11, 2.0**10, 2.0**10, 2.0**11]


def test_the_scaler_comes_back() -> None:
    scaler = LossScaler(8.0, growth_interval=5)
    scaler.update(torch.tensor(True))
    scaler.update(torch.tensor(False))
    other = LossScaler()
    other.load_state_dict(scaler.state_dict())
    assert (other.get_scale(), other._growth.item(), other.growth_interval) == (4.0, 1, 5)
    with pytest.raises(ValueError, match="has no scale"):
        other.load_state_dict({})
    with pytest.raises(ValueError, match="must be positive"):
        LossScaler(0.0)
    fixed = LossScaler(4.0, dynamic=False)
    fixed.update(torch.tensor(True))
    assert fixed.get_scale() == 4.0
