"""Clipping: by the norm of all, of each, and by value, without rewriting a gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from stored import give_gradients, parameters, same

from fasttrain.optim import SGD, AdamW, clip_grad_norm


@pytest.mark.parametrize("storage", [{}, {"storage": "8-byte"}])
def test_clipping_by_the_norm_enters_the_step(storage: dict[str, Any], backend: str) -> None:
    params, twins = parameters(), parameters()
    a, b = AdamW(params, lr=1e-2, backend=backend, **storage), AdamW(twins, lr=1e-2, backend=backend, **storage)
    for step in range(4):
        give_gradients(params, step, scale=0.001 if step == 2 else 1.0)
        give_gradients(twins, step, scale=0.001 if step == 2 else 1.0)
        before = [p.grad.clone() for p in params]
        norm = a.clip_grad_norm_(1.0)
        truth = torch.stack([g.double().square().sum() for g in before]).sum().sqrt()
        assert norm.dtype == torch.float32
        assert norm.item() == pytest.approx(truth.item(), rel=1e-6)
        a.step()
        same([p.grad for p in params], before, "gradients are not rewritten")
        b._clip = min(1.0, 1.0 / (norm.item() + 1e-6))  # the coefficient, injected
        b.step()
    same([p.detach() for p in params], [p.detach() for p in twins], "clipped steps")
    give_gradients(params, 9)
    a.step()  # the coefficient held for one step
    give_gradients(twins, 9)
    b.step()
    same([p.detach() for p in params], [p.detach() for p in twins], "the step after")


def test_one_norm_of_several_optimizers() -> None:
    params = parameters(torch.float32)
    for p in params:
        p.grad = torch.ones_like(p)
    pair = [SGD(params[:1], lr=1.0), SGD(params[1:], lr=1.0)]
    norm = clip_grad_norm(pair, 0.5)
    assert norm.item() == pytest.approx(math.sqrt(sum(p.numel() for p in params)), rel=1e-6)
    before = [p.detach().clone() for p in params]
    for optimizer in pair:
        optimizer.step()
    for p, q in zip(params, before, strict=True):
        assert torch.allclose(q - p, torch.full_like(p, 0.5 / norm.item()), rtol=1e-4)  # of a difference
    params[0].grad[0] = math.inf
    with pytest.raises(RuntimeError, match="nothing was clipped"):
        clip_grad_norm(pair, 1.0, error_if_nonfinite=True)
    assert pair[0]._clip == 1.0
    with pytest.raises(ValueError, match="must not be negative"):
        clip_grad_norm(pair, -1.0)


def test_clipping_by_value_and_of_each_parameter(backend: str) -> None:
    params = parameters(torch.float32)
    optimizer = SGD(params, lr=1.0, clip_value=0.25, backend=backend)
    before = [p.detach().clone() for p in params]
    give_gradients(params, 0)
    optimizer.step()
    for p, q in zip(params, before, strict=True):
        assert_same_bits(p.detach(), q - p.grad.clamp(-0.25, 0.25), "by value")
    params = parameters(torch.float32)
    optimizer = SGD(params, lr=1.0, clip_each=3.0, backend=backend)
    before = [p.detach().clone() for p in params]
    give_gradients(params, 0)
    optimizer.step()
    for p, q in zip(params, before, strict=True):
        coefficient = min(1.0, 3.0 / (p.grad.double().norm().item() + 1e-6))
        assert torch.allclose(p.detach(), q - coefficient * p.grad, rtol=1e-6, atol=1e-6)
