"""Checkpoints of a state on a GPU: copied on a stream of its own, and loaded onto it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointed import assert_same
from torch import nn

from fasttrain.checkpoint import Checkpointer, Rng
from fasttrain.optim import AdamW

pytestmark = pytest.mark.gpu
GPU = "cuda"


def made(seed: int, **options: Any) -> tuple[nn.Module, AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).to(GPU, torch.bfloat16)
    return model, AdamW(model.parameters(), lr=1e-2, **options)


def step(model: nn.Module, optimizer: AdamW, number: int) -> None:
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(number)).to(GPU, torch.bfloat16)
    nn.functional.dropout(model(x), 0.1).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def state_of(model: nn.Module, optimizer: AdamW) -> Any:
    return copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"], torch.cuda.get_rng_state()])


@pytest.mark.parametrize("options", [dict(storage="8-byte", ema_decay=0.9), dict(capturable=True), dict(master="fp32")])
@pytest.mark.parametrize("staging", ["memory", "none"])
def test_the_state_at_the_call_is_saved(options: dict[str, Any], staging: str, tmp_path: Path) -> None:
    model, optimizer = made(0, **options)
    state = {"model": model, "optimizer": optimizer, "rng": Rng()}
    with Checkpointer(tmp_path, staging=staging) as checkpoints:
        for number in range(3):
            step(model, optimizer, number)
            wanted = state_of(model, optimizer) if number == 2 else None
            checkpoints.save(number, state)
            for p in model.parameters():  # queued at once, behind the copies
                p.data.add_(0.0 if number < 2 else 1.0)
        if staging == "memory":
            assert checkpoints._staging._memory.is_pinned()
        other, again = made(1, **options)
        loaded = checkpoints.load({"model": other, "optimizer": again, "rng": Rng()})
    assert loaded is not None
    assert loaded.step == 2
    assert_same(state_of(other, again), wanted)
    model, optimizer = made(2, **options)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.load({"model": model, "optimizer": optimizer, "rng": Rng()})
        step(model, optimizer, 3)
        checkpoints.load({"rng": Rng()})
    step(other, again, 3)
    assert_same(state_of(other, again)[:2], state_of(model, optimizer)[:2])


def test_saving_does_not_wait_for_the_device(tmp_path: Path) -> None:
    model, optimizer = made(0)
    step(model, optimizer, 0)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"model": model, "optimizer": optimizer}).wait()
        torch.cuda.set_sync_debug_mode("error")
        try:
            saving = checkpoints.save(2, {"model": model, "optimizer": optimizer})
        finally:
            torch.cuda.set_sync_debug_mode("default")
        saving.wait()
