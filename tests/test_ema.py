"""The average of the parameters: its numbers, and swapping it in and out."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_same_bits
from stored import give_gradients, parameters, run, same, states

from fasttrain.optim import AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ema_is_the_average_of_the_weights(dtype: torch.dtype, backend: str) -> None:
    params = parameters(dtype)
    options = {"master": "split"} if dtype == torch.bfloat16 else {}
    optimizer = AdamW(params, lr=1e-2, ema_decay=0.9, backend=backend, **options)
    averages = [p.detach().double().clone() for p in params]
    for step in range(20):
        if step == 10:
            params[1].requires_grad_(False)
        give_gradients(params, step)
        if step >= 10:
            params[1].grad = None  # a resting parameter: its average approaches it
        optimizer.step()
        for i, p in enumerate(params):
            now = p.detach().double()
            if options and p.grad is not None:
                bits = (p.detach().view(torch.int16).int() << 16) + optimizer.state[p]["remainder"].int()
                now = bits.view(torch.float32).double()
            averages[i] = 0.9 * averages[i] + 0.1 * now
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6  # 20 steps of three fp32 roundings each
    for p, average in zip(params, averages, strict=True):
        assert torch.allclose(optimizer.state[p]["ema"].double(), average, rtol=tolerance, atol=tolerance)


def test_ema_weights_are_swapped_in_and_out() -> None:
    params = parameters()
    optimizer = AdamW(params, lr=1e-2, ema_decay=0.5, master="split")
    run(params, optimizer, 3)
    own, kept = [p.detach().clone() for p in params], states(optimizer, params)
    with optimizer.ema_weights():
        for p in params:
            assert_same_bits(p.detach(), optimizer.state[p]["ema"].bfloat16(), "inside")
        with pytest.raises(RuntimeError, match="ema_weights"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="inside another"), optimizer.ema_weights():
            pass
    same([p.detach() for p in params], own, "after")
    twin = copy.deepcopy(optimizer)
    run(params, optimizer, 1, first=3)
    twins = [p for group in twin.param_groups for p in group["params"]]
    run(twins, twin, 1, first=3)
    same([p.detach() for p in params], [p.detach() for p in twins], "a step after the swap")
    assert kept[0]["remainder"].any()
    with pytest.raises(RuntimeError, match="no parameter group has an ema_decay"), AdamW(params).ema_weights():
        pass
