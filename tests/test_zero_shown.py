"""What is done to `p.grad` while gradients lie in shards: an error that says what to do instead, and no silence."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from helpers import assert_same_bits
from sharded import backward, loss_of, model_of
from torch import nn

from fasttrain.optim import AdamW
from fasttrain.parallel import DataParallel, Zero


def touched(wire: Any, stage: int) -> None:
    model = model_of(wire)
    zero = Zero(model, AdamW, stage=stage, lr=0.1)
    params = list(model.module.parameters())
    assert all(p.grad is None for p in params)
    backward(model, 1, wire.rank)
    used = [p for p in params if p.grad is not None]
    names = {name for name, p in model.module.named_parameters() if p.grad is None}
    assert names == {"extra.weight", "extra.bias", "unused.weight", "unused.bias", "frozen.weight", "frozen.bias"}
    first = model.module.embed.weight
    assert any(p is first for p in used)
    assert first.grad.shape == first.shape
    assert first.grad.dtype == first.dtype
    assert repr(first.grad) == "<the gradient of embed.weight lies in shards over the ranks>"
    for touch in (lambda: nn.utils.clip_grad_norm_(params, 1.0), lambda: nn.utils.clip_grad_value_(params, 1.0),
                  lambda: nn.utils.clip_grad_norm_(params, 1.0, foreach=True), lambda: first.grad.norm(),
                  lambda: first.grad.data.mul_(2), lambda: torch.isfinite(first.grad),
                  lambda: torch.stack([first.grad]), lambda: model.module.zero_grad(set_to_none=False)):
        with pytest.raises(RuntimeError, match=r"finds no gradient of .*\(Zero\); clip with clip_grad_norm_ of the"):
            touch()
    torch.testing.assert_close(zero.clip_grad_norm_(1.0), zero.grad_statistics()[0].sqrt().float())
    zero.step()
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("stage", [1, 2])
def test_what_reads_or_writes_it_raises(stage: int) -> None:
    ranks.run(touched, 2, stage)


def goes_on(wire: Any, stage: int) -> None:
    """Later passes, silent and synchronised, of a model that is compiled meanwhile: as if `p.grad` were None."""
    ends = []
    for shown in (True, False):
        model = model_of(wire)
        zero = Zero(model, AdamW, stage=stage, lr=0.1)
        for step in range(2):
            backward(model, step, wire.rank)
            if not shown:
                for p in model.module.parameters():
                    p.grad = None
            elif step and stage == 1:
                compiled = torch.compile(model.module, backend="aot_eager", fullgraph=True)
                compiled(torch.zeros(2, 3, dtype=torch.int64))  # it looks at the gradients, too
            with model.no_sync():
                loss_of(model, step, wire.rank, 1).backward()
            assert all(type(p.grad) in (torch.Tensor, type(None)) for p in model.module.parameters())
            loss_of(model, step, wire.rank, 2).backward()
            zero.step()
        ends.append([p.detach() for p in model.module.parameters()])
    for one, other in zip(*ends, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("stage", [1, 2])
def test_later_passes_go_on_without_it(stage: int) -> None:
    ranks.run(goes_on, 2, stage)


def alone(wire: Any) -> None:
    """One parameter, whose gradient is the first to arrive in every pass."""
    model = DataParallel(nn.Linear(4, 1, bias=False), mesh=wire)
    zero = Zero(model, AdamW, lr=0.1)
    for _ in range(3):
        model(torch.ones(1, 4)).sum().backward()
    assert zero.clip_grad_norm_(1.0).item() == 6.0  # three times, of four ones


def test_one_parameter() -> None:
    ranks.run(alone, 2)
