"""Weights in full precision out of ZeRO and back, and the hooks around its state dicts."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from helpers import assert_same_bits
from sharded import assert_same_model, backward, pair
from torch import Tensor

from fasttrain.optim import AdamW, Muon
from fasttrain.parallel import Zero

F32, BF16 = torch.float32, torch.bfloat16
CASES = [
    (AdamW, {"lr": 0.01, "master": "split"}, BF16),
    (AdamW, {"lr": 0.01, "master": "fp32", "state_dtype": "int8", "min_size": 64}, BF16),
    (Muon, {"lr": 0.01}, F32),
    (torch.optim.AdamW, {"lr": 0.01, "foreach": False}, BF16),
]


def assert_same(one: list[Tensor], other: list[Tensor], what: str) -> None:
    assert len(one) == len(other)
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        assert_same_bits(a, b, f"{what}, weight {index}")


def out_and_in(wire: Any, stage: int) -> None:
    for cls, options, dtype in CASES:
        model, zero, twin, whole = pair(wire, cls, dtype, stage, options, overlap=stage == 2)
        steps(model, zero, twin, whole, wire.rank, 0)
        of_torch = cls is torch.optim.AdamW
        digits = [p.detach().float() for p in twin.module.parameters()] if of_torch else whole.full_precision()
        got = zero.full_precision()
        assert_same(got, digits, cls.__name__)
        assert of_torch or dtype == F32 or any(not a.bfloat16().float().equal(a) for a in got)
        assert bool(zero.full_precision(to=1)) == (wire.rank == 1)
        changed = [value * 1.001 for value in digits]
        zero.load_full_precision(changed)
        if of_torch:
            for p, value in zip(twin.module.parameters(), changed, strict=True):
                p.detach().copy_(value)
        else:
            whole.load_full_precision(changed)
            assert_same(zero.full_precision(), whole.full_precision(), f"{cls.__name__}, loaded")
        assert_same_model(model, twin, cls.__name__)
        steps(model, zero, twin, whole, wire.rank, 1)
    with pytest.raises(ValueError, match="1 weights are given for"):
        zero.load_full_precision(changed[:1])
    with pytest.raises(ValueError, match=r"the weight has shape \(\), the parameter"):
        zero.load_full_precision([torch.zeros(()) for _ in changed])
    with pytest.raises(ValueError, match="ranks 0 to 1; None for all"):
        zero.full_precision(to=2)


def steps(model: Any, zero: Zero, twin: Any, whole: Any, rank: int, begin: int) -> None:
    for wrapped, optimizer in ((model, zero), (twin, whole)):
        backward(wrapped, begin, rank)
        optimizer.step()
        optimizer.zero_grad()
    zero.gather()
    assert_same_model(model, twin, f"step {begin}")


@pytest.mark.parametrize("stage", [1, 2])
def test_all_digits_out_and_in(stage: int) -> None:
    ranks.run(out_and_in, 2, stage)


def hooked(wire: Any) -> None:
    """As torch's optimizers call them: with the optimizer and the state dict, which what they return replaces."""
    model, zero, twin, whole = pair(wire, AdamW, F32, 1, {"lr": 0.01})
    steps(model, zero, twin, whole, wire.rank, 0)
    zero.consolidate_state_dict(to=wire.rank)
    told: dict[str, list[str]] = {}
    for name, optimizer in (("divided", zero), ("whole", whole)):
        seen = told[name] = []
        optimizer.register_state_dict_pre_hook(lambda o, seen=seen: seen.append("before saving"))
        optimizer.register_state_dict_post_hook(
            lambda o, state, seen=seen: (seen.append("after saving"), {**state, "more": 1})[1])
        optimizer.register_load_state_dict_pre_hook(
            lambda o, state, seen=seen: (seen.append(f"before loading {state.pop('more')}"), None)[1])
        optimizer.register_load_state_dict_post_hook(lambda o, seen=seen: seen.append("after loading"))
        saved = optimizer.state_dict()
        assert saved["more"] == 1
        optimizer.load_state_dict(saved)
        assert saved["more"] == 1, "a hook may change the copy that it is given"
    assert told["divided"] == told["whole"] == ["before saving", "after saving", "before loading 1", "after loading"]
    steps(model, zero, twin, whole, wire.rank, 1)


def test_hooks_of_state_dicts() -> None:
    ranks.run(hooked, 1)
