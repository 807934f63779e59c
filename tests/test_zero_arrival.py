"""Buckets that are stepped as they land, within backward: the bits of the ordinary step, and what cannot go with it."""

from __future__ import annotations

import time
from typing import Any

import pytest
import ranks
import torch
from sharded import Net, assert_same_model, assert_same_state, backward, loss_of, model_of

from fasttrain import LossScaler
from fasttrain.optim import SGD, AdamW, Muon, ScheduleFreeAdamW
from fasttrain.parallel import Zero

CASES = {
    "AdamW": (AdamW, {"lr": 0.1, "ema_decay": 0.9}, torch.float32),
    "draws": (AdamW, {"lr": 0.1, "storage": "6-byte", "min_size": 64}, torch.bfloat16),
    "ScheduleFree": (ScheduleFreeAdamW, {"lr": 0.1}, torch.float32),
    "Muon": (Muon, {"lr": 0.01}, torch.float32),
    "clip_each": (SGD, {"lr": 0.1, "momentum": 0.9, "clip_each": 0.1}, torch.float32),
}


NAMES = [name for name, p in Net().named_parameters() if p.requires_grad]
LATE = ("unused", "extra")  # what other ranks may not use holds up what comes after
ORDER = [name for late in (False, True) for name in NAMES[::-1] if name.startswith(LATE) == late]


def landed(zero: Zero) -> None:
    """Wait until the first buckets are there; this rank may have nothing of one or two."""
    end = time.monotonic() + 10
    while not all(sent.done() for sent in zero.method._flying[:4]) and time.monotonic() < end:
        time.sleep(0.001)


def trained(wire: Any, stage: int) -> list[int]:
    """Beside ZeRO that steps at once; how many gradients had come at the first step of each backward pass."""
    first = []
    for case, (cls, options, dtype) in CASES.items():
        model, twin = (model_of(wire, dtype, order=ORDER, bucket_cap_mb=0.005) for _ in "ab")
        zero = Zero(model, cls, stage=stage, overlap=case == "AdamW", **options)
        beside = Zero(twin, cls, stage=stage, **options)
        arrival = zero.step_on_arrival()
        seen: list[int] = []
        inner = zero.inner._pass
        zero.inner._pass = lambda *given, seen=seen, inner=inner, model=model: (
            seen.append(len(model.reducer._arrivals)), inner(*given))
        model.module.body[0].weight.register_hook(lambda _, zero=zero: landed(zero))
        for step in range(3):
            seen.clear()
            for wrapped, optimizer in ((model, zero), (twin, beside)):
                backward(wrapped, step, wire.rank, 1 + step % 2)
                optimizer.step()
            zero.gather()
            assert_same_model(model, twin, f"{case}, step {step}")
            first.append(seen[0] - len(model.reducer._arrivals))
        assert_same_state(zero.consolidate(None), beside.consolidate(None))
        arrival.remove()
        backward(model, 3, wire.rank)
        zero.clip_grad_norm_(1.0)  # goes again
        zero.zero_grad()
    return first


@pytest.mark.parametrize(("stage", "size"), [(1, 2), (2, 3)])
def test_the_bits_of_the_ordinary_step(stage: int, size: int) -> None:
    for first in ranks.run(trained, size, stage):
        assert max(first) < 0, "buckets are stepped before the last gradient has come"


def refused(wire: Any) -> None:
    model = model_of(wire)
    zero = Zero(model, AdamW, lr=0.1)
    arrival = zero.step_on_arrival()
    with pytest.raises(RuntimeError, match="on arrival already"):
        zero.step_on_arrival()
    model.count(3)
    backward(model, 0, wire.rank)
    for needs_all in (lambda: zero.clip_grad_norm_(1.0), lambda: LossScaler().step(zero), lambda: model.step(zero)):
        with pytest.raises(RuntimeError, match=r"step_on_arrival.*before .* is known"):
            needs_all()
    with pytest.raises(RuntimeError, match=r"some buckets .* have been stepped"):
        arrival.remove()
    with pytest.raises(RuntimeError, match=r"call step\(\) before the next, and accumulate under no_sync"):
        loss_of(model, 1, wire.rank).backward()
    with pytest.raises(TypeError, match="AdamW steps all parameters at once"):
        Zero(model_of(wire), torch.optim.AdamW, lr=0.1).step_on_arrival()


def test_what_needs_all_gradients_is_refused() -> None:
    ranks.run(refused, 2)
