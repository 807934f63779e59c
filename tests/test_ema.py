"""The average of the parameters: its numbers, and swapping it in and out."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers import assert_same_bits, generator
from stored import give_gradients, parameters, run, same, states
from torch.nn import Parameter

from fasttrain.optim import SGD, AdamW


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


@pytest.mark.parametrize(("dtype", "decay", "unit"), [("bf16", 0.999, 2.0**-8), ("fp16", 0.9999, 2.0**-11)])
def test_the_ema_of_a_resting_parameter_is_rounded_at_random(dtype: str, decay: float, unit: float) -> None:
    """Rounded to nearest, an average would not move: below 1 it goes by less than half of a unit."""
    ends = []
    for seed in (1, 1, 2):
        params = [Parameter(torch.ones(4096)), Parameter(torch.ones(1))]
        optimizer = SGD(params, lr=0.0, ema_decay=decay, ema_dtype=dtype, seed=seed)
        give_gradients(params, 0)
        optimizer.step()
        params[0].data.zero_()
        params[0].grad = None
        averages = [optimizer.state[params[0]]["ema"].clone()]
        for step in range(1, 201):
            give_gradients(params[1:], step)
            optimizer.step()
            averages.append(optimizer.state[params[0]]["ema"].clone())
        ends.append(averages)
    assert optimizer.param_groups[0]["draws"] == 201
    one, again, other = ends
    for average, the_same in zip(one, again, strict=True):
        assert_same_bits(average, the_same)
    assert not torch.equal(one[-1], other[-1])
    assert one[0].eq(1).all()
    # The error of 200 draws is at most sqrt(200) / 2 units, that of a mean of 4,096 elements 1/64 of it.
    assert one[-1].double().mean().item() == pytest.approx(decay**200, abs=5 * 200**0.5 * unit / 2 / 64)
    moved = [(after != before).double().mean().item() for before, after in itertools.pairwise(one)]
    assert all(0.0 < share < 1.0 for share in moved)


def test_an_ema_moves_once_where_parameters_are_stepped_on_arrival() -> None:
    arriving, usual = (AdamW(parameters(), lr=1e-2, ema_decay=0.9, ema_dtype="bf16", master="split") for _ in range(2))
    arriving.step_on_arrival()
    for step in range(4):
        for optimizer in (arriving, usual):
            params = optimizer.param_groups[0]["params"]
            numbers = generator(step)
            loss = sum((p * torch.randn(p.shape, generator=numbers)).sum() for p in params[step == 2:])
            loss.backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
    same(*(states(optimizer, optimizer.param_groups[0]["params"]) for optimizer in (arriving, usual)), "on arrival")


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
