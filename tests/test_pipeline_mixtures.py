"""Mixtures of experts in a pipeline: the loss that it tells has theirs in it, and a loss scale is theirs, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run
from torch import Tensor, nn

from fasttrain.dist.mesh import Mesh
from fasttrain.parallel.experts import MoE, auxiliary
from fasttrain.parallel.pipeline import Pipeline, split
from fasttrain.precision.loss_scale import LossScaler

WIDTH, MICRO, SCALE = 4, 4, 1024.0


def made(number: int) -> nn.Module:
    torch.manual_seed(number)
    return MoE(WIDTH, 6, 4, 2, activation="gelu", dtype=torch.float64, balance=0.5, z=0.1)


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(2 * MICRO, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x, x.flip(0)


def piped(wire: Any, schedule: str) -> tuple[list[float], dict[str, Tensor]]:
    mesh = Mesh(pipeline=2)
    each = 2 if schedule == "zbv" else 1
    stages = split([made(number) for number in range(2 * each)], mesh, schedule=schedule, costs=[1.0] * 2 * each)
    pipeline = Pipeline(stages, mesh, loss_of, micro_batches=MICRO, mixtures=1 / MICRO,
                        scaler=LossScaler(SCALE, dynamic=False))
    losses = []
    for _ in range(2):  # what one step has carried is not told again
        for p in stages.parameters():
            p.grad = None
        losses.append(pipeline.step(*batch()).item())
    pipeline.close()
    return losses, {name: p.grad / SCALE for name, p in stages.named_parameters()}


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_loss_and_gradients_are_those_of_one_process(schedule: str) -> None:
    whole = nn.ModuleList(made(number) for number in range(4 if schedule == "zbv" else 2))
    total = 0.0
    for x, target in zip(*(part.chunk(MICRO) for part in batch()), strict=True):
        for part in whole:
            x = part(x)
        loss = (loss_of(x, target) + auxiliary(whole)) / MICRO
        loss.backward()
        total += loss.item()
    answers = run(piped, 2, schedule)
    wanted = {name: p.grad for name, p in whole.named_parameters()}
    found = answers[0][1] | answers[1][1]
    assert sorted(found) == sorted(wanted)
    for losses, _ in answers:
        assert losses == pytest.approx([total, total], rel=1e-12)
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-10, atol=1e-12)
