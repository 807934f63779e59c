"""Every axis alone and many together: losses, gradients, norms and parameters are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from composed import CLIP, Alone, Composition, Divided
from ranks import run

from fasttrain.dist.mesh import Mesh
from fasttrain.optim.local import local

STEPS = 3
ALONE = [
    Composition({"data": 2}, micro=2), Composition({"shard": 2}, zero=3, micro=2), Composition({"tensor": 2}, micro=2),
    Composition({"tensor": 2}, sequence=True, tied=True), Composition({"pipeline": 2}, micro=4),
    Composition({"expert": 2}, experts=4, micro=2), Composition({"context": 2}, kv_heads=2),
    Composition({"tensor": 2}, sequence=True, dtype=torch.float32), Composition({"data": 2}, zero=1),
    Composition({"data": 2}, zero=2, tied=True, micro=2)]
TOGETHER = [
    Composition({"pipeline": 2, "tensor": 2}, micro=4, tied=True),
    Composition({"data": 2, "tensor": 2}, sequence=True, gated=True, kv_heads=2, micro=2),
    Composition({"shard": 2, "tensor": 2}, zero=3, sequence=True, tied=True, micro=2),
    Composition({"pipeline": 2, "shard": 2}, zero=3, micro=4, gated=True, tied=True, schedule="zbv"),
    Composition({"data": 2, "tensor": 2}, zero=2, tied=True, micro=2),
    Composition({"pipeline": 2, "data": 2}, zero=1, micro=2, tied=True, schedule="interleaved"),
    Composition({"expert": 2, "tensor": 2}, experts=4, sequence=True),
    Composition({"context": 2, "tensor": 2}, sequence=True, kv_heads=2, micro=2, recompute=True),
    Composition({"pipeline": 2, "context": 2}, micro=2, schedule="zero-bubble"),
    Composition({"data": 2, "shard": 2}, zero=3, recompute=True),
    Composition({"pipeline": 2, "tensor": 2}, micro=2, schedule="zbv", tied=True, dtype=torch.float32),
    Composition({"pipeline": 2, "data": 2, "tensor": 2}, sequence=True, tied=True, micro=2),
    Composition({"pipeline": 2, "shard": 2, "tensor": 2}, zero=3, sequence=True, kv_heads=2, gated=True, micro=2),
    Composition({"pipeline": 2, "expert": 2, "tensor": 2}, experts=4, sequence=True, micro=2, tied=True)]

REST = [  # so that every pair of axes, and every stage of ZeRO on each, has run
    Composition({"expert": 2, "context": 2}, experts=4), Composition({"data": 2, "context": 2}, zero=1),
    Composition({"data": 2, "expert": 2}, zero=2, experts=4, micro=2),
    Composition({"shard": 2, "expert": 2}, zero=3, experts=4),
    Composition({"shard": 2, "context": 2}, zero=3, tied=True),
    Composition({"pipeline": 2, "tensor": 2}, sequence=True, micro=2, recompute=True, schedule="zero-bubble"),
    Composition({"pipeline": 2, "data": 2}, zero=2, micro=2, tied=True, schedule="zbv"),
    Composition({"pipeline": 2, "expert": 2}, zero=1, experts=4, micro=2)]


def steps(wire: Any, how: Composition) -> list[Any]:
    """What this rank saw in each step; then `ones`, where parameters show their gradients."""
    torch.manual_seed(wire.rank)  # nothing may depend on it
    divided = Divided(how, Mesh(**how.mesh))
    found: list[Any] = []
    for step in range(STEPS):
        loss = divided.backward(step)
        gradients = divided.gradients() if how.zero not in (1, 2) else {}
        squares, bad = divided.statistics()
        found.append((loss, gradients, squares.sqrt().item(), bool(bad), divided.step(), divided.parameters()))
    return [*found, ones(divided) if gradients else None]


def ones(divided: Divided) -> float:
    """The sum of squares by which an optimizer clips, of gradients that are all one."""
    divided.backward(0)
    for p in divided.bare.parameters():
        local(p.grad).fill_(1.0)
    return divided.optimizer.grad_statistics()[0].item()


def close(got: Any, wanted: Any, what: str, how: Composition) -> None:
    bound = 1e-10 if how.dtype == torch.float64 else 2e-4  # fp32: other orders of sums, through 3 blocks and 3 steps
    torch.testing.assert_close(got, wanted, rtol=bound, atol=bound, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("how", [
    *ALONE, *TOGETHER, *(pytest.param(how, marks=pytest.mark.slow) for how in REST)], ids=str)
def test_a_divided_model_is_that_of_one_process(how: Composition) -> None:
    alone = Alone(how)
    answers = run(steps, how.world, how)
    ties = {} if not how.tied else {"head.weight": "embedding.bytes.weight"}
    for step in range(STEPS):
        loss = alone.backward(step)
        named = dict(alone.model.named_parameters())
        norm, missing = alone.norm(), set(named)
        for rank, answer in enumerate(answers):
            got, gradients, seen, bad, clipped, _ = answer[step]
            close(got, loss, f"loss of step {step} on rank {rank}", how)
            close(seen, norm, f"norm of step {step} on rank {rank}", how)
            assert clipped == pytest.approx(norm, rel=1e-6), "it is float32"
            assert not bad
            for name, grad in gradients.items():
                close(grad, named[ties.get(name, name)].grad, f"gradient of {name} in step {step} on rank {rank}", how)
        alone.optimizer.clip_grad_norm_(CLIP)
        alone.optimizer.step()
        alone.optimizer.zero_grad()
        for rank, answer in enumerate(answers):
            for name, p in answer[step][-1].items():
                close(p, named[ties.get(name, name)].detach(), f"{name} after step {step} on rank {rank}", how)
                missing.discard(ties.get(name, name))
        assert not missing, "parameters that no rank has"
    count = sum(p.numel() for p in alone.model.parameters())
    assert {answer[-1] for answer in answers} == {None if how.zero in (1, 2) else float(count)}
