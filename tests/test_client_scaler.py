"""torch.amp.GradScaler on the CPU with our optimizers, against the same run with torch's."""

from typing import Any

import pytest
import torch
from clients import F32, F64, PAIRS, assert_close_run, batches, follow, model_of, named, squared_error
from helpers import assert_same_run

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 10
SPOILT = {3: float("inf"), 6: float("nan")}  # steps at which the loss is not finite


def train(make: Any, fused: bool | None, clipped: bool) -> dict[str, Any]:
    """A loop as torch's documents write it; the loss of some steps is not finite."""
    model = model_of(F64)
    optimizer = make(model.parameters(), fused=fused)
    # Not a power of two, so that unscaling rounds; it grows after two good steps.
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, growth_interval=2, growth_factor=1.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    scales, norms = [], []
    for i, batch in enumerate(batches(STEPS)):
        optimizer.zero_grad()
        loss = squared_error(model, batch)
        if i in SPOILT:  # in one gradient of six: all must be skipped
            loss = loss + (model[3].bias * SPOILT[i]).sum()
        scaler.scale(loss).backward()
        before = named(model, optimizer)
        if clipped:
            scaler.unscale_(optimizer)
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
        scaler.step(optimizer)
        scaler.update()
        if i in SPOILT:
            assert_same_run(named(model, optimizer), before, f"step {i}, to be skipped")
        if scaler.get_scale() >= (scales[-1] if scales else 0):
            schedule.step()
        scales.append(scaler.get_scale())
    if clipped:
        assert sum(norm > 0.1 for norm in norms) > 2
    for state in optimizer.state.values():
        if "step" in state:
            assert state["step"] == STEPS - len(SPOILT)
    return {"scales": scales, "ends": named(model, optimizer), "scaler": scaler.state_dict(),
            "lr": optimizer.param_groups[0]["lr"]}


@pytest.mark.parametrize("clipped", [False, True], ids=["plain", "unscaled and clipped"])
@pytest.mark.parametrize("fused", [None, True], ids=["default", "fused"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_scaled_run_ends_as_with_torch(name: str, fused: bool | None, clipped: bool) -> None:
    ours, theirs = (train(make, fused, clipped) for make in PAIRS[name])
    assert ours["scales"] == theirs["scales"]
    assert ours["scaler"] == theirs["scaler"]
    assert ours["lr"] == theirs["lr"]
    assert any(b > a for a, b in zip(ours["scales"], ours["scales"][1:], strict=False))
    assert_close_run(ours["ends"], theirs["ends"])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_every_step_under_autocast_is_torchs(name: str, kind: torch.dtype) -> None:
    """Gradients accumulated over two batches, unscaled before the step so that it can be compared."""
    model = model_of(F32)
    ours, theirs = PAIRS[name]
    optimizer = ours(model.parameters())
    steps = follow(optimizer, theirs)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for i, batch in enumerate(batches(STEPS, F32)):
        with torch.autocast("cpu", kind):
            loss = squared_error(model, batch)
        scaler.scale(loss / 2).backward()
        if i % 2:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert steps == [6] * (STEPS // 2)


def test_one_scaler_for_two_optimizers() -> None:
    """Only the one whose gradients are not finite is skipped."""
    ends = []
    for kind in (0, 1):
        model = model_of()
        optimizers = [PAIRS["AdamW"][kind](model[0].parameters()), PAIRS["SGD"][kind](model[1:].parameters())]
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for i, batch in enumerate(batches(4)):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = squared_error(model, batch) + (model[0].bias * (float("inf") if i == 2 else 0.0)).sum()
            scaler.scale(loss).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
        ends.append(named(model, optimizers[0]) | named(model, optimizers[1]))
        assert scaler.get_scale() == 4.0
        assert all(state["step"] == 3 for state in optimizers[0].state.values())
    assert_close_run(*ends)
