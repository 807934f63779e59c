"""Mixtures in the stages of a pipeline, whose losses no stage but the last could add: torch's schedules carry them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixtures import grads, naive, values
from ranks import run
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from fasttrain.dist.mesh import MEAN, Mesh
from fasttrain.parallel.experts import MoE, carry

WIDTH, STAGES, MICRO, ROWS = 4, 4, 4, 3


class Stage(nn.Module):
    def __init__(self, number: int, mesh: Mesh | None, again: bool = False):
        super().__init__()
        torch.manual_seed(number)
        self.mixture = MoE(WIDTH, 6, 4, 2, activation="gelu", mesh=mesh, dtype=torch.float64, balance=0.5, z=0.1)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        if self.again:
            return x + checkpoint(self.mixture, x, use_reentrant=False)
        return x + self.mixture(x)


def batch(replica: int) -> Tensor:
    """The micro-batches of a replica: (micro-batch and row, position, feature)."""
    return torch.randn(MICRO * ROWS, 2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(replica))


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).pow(2).mean() / MICRO


def piped(wire: Any, name: str, again: bool) -> dict[int, Any]:
    mesh = Mesh(data=1, pipeline=2, expert=2)
    kind, rank = schedules.get_schedule_class(name), mesh.coordinates["pipeline"]
    if name.startswith("1F1B"):
        numbers = [rank]
    else:  # a V, or round and round
        numbers = [rank, 3 - rank] if name.startswith("ZBV") else [rank, rank + 2]
    modules = [Stage(number, mesh, again) for number in range(STAGES)]
    if name.startswith("1F1B"):
        modules = [nn.Sequential(*modules[:2]), nn.Sequential(*modules[2:])]
    for number in numbers:
        carry(modules[number], 1 / MICRO)
    stages = [PipelineStage(modules[number], number, len(modules), torch.device("cpu"),
                            group=mesh["pipeline"].get_group()) for number in numbers]
    schedule = kind(stages[0] if name.startswith("1F1B") else stages, MICRO, loss_fn=loss_of, scale_grads=False)
    x = batch(mesh.replica)
    given = (x,) if 0 in numbers else ()
    if len(modules) - 1 in numbers:
        schedule.step(*given, target=x.flip(0))
    else:
        schedule.step(*given)
    found = {}
    for number in numbers:
        for p in modules[number].parameters():
            own = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            axes = [axis for axis in MEAN if not (isinstance(p, DTensor) and axis == "expert")]
            mesh.wire(*axes, use="test").sum_(own).div_(mesh.terms)
        for place, stage in enumerate(modules[number] if name.startswith("1F1B") else [modules[number]]):
            found[2 * number + place if name.startswith("1F1B") else number] = grads(stage)
    return found


@pytest.mark.parametrize("name, again", [("1F1B", False), ("1F1B", True), ("ZBVZeroBubble", False),
                                         pytest.param("InterleavedZeroBubble", True, marks=pytest.mark.slow),
                                         pytest.param("Interleaved1F1B", False, marks=pytest.mark.slow)])
def test_schedules(name: str, again: bool) -> None:
    """Two stages of two ranks with half of the experts each, four micro-batches: the gradients of the loop."""
    answers = run(piped, 4, name, again)
    weights = [values(Stage(number, None).mixture) for number in range(STAGES)]
    for replica in range(2):
        for x, target in zip(batch(replica).chunk(MICRO), batch(replica).flip(0).chunk(MICRO), strict=True):
            total = torch.zeros((), dtype=torch.float64)
            for some in weights:
                one = naive(some, x, activation="gelu")
                x, total = x + one.output, total + 0.5 * one.balance + 0.1 * one.z
            ((loss_of(x, target) + total / MICRO) / 2).backward()
    assert sorted(number for answer in answers[::2] for number in answer) == list(range(STAGES))
    for answer in answers:
        for number, found in answer.items():
            for key, grad in found.items():
                torch.testing.assert_close(grad, weights[number][key.removeprefix("mixture.")].grad, rtol=1e-10,
                                           atol=1e-12)
