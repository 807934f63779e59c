"""Schedules of a pipeline of four processes whose stages sleep: the time that ranks are idle, beside the formulas."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.processes import together
from fasttrain.dist.mesh import Mesh
from fasttrain.dist.wire import Wire
from fasttrain.parallel.pipeline import Pipeline, clock, figures, schedules, split

RANKS, MICRO_BATCHES, SECONDS, STEPS = 4, 8, 0.1, 2  # seconds of forward, inputs and weights, all stages of a rank


class Sleep(torch.autograd.Function):
    """The identity, whose backward pass takes a while."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float, times: list[tuple[float, float]]) -> Tensor:
        ctx.sleeps = seconds, times
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        sleep(*ctx.sleeps)
        return *grads, None, None


def sleep(seconds: float, times: list[tuple[float, float]]) -> None:
    """Let time go by, and note when."""
    begun = time.perf_counter()
    time.sleep(seconds)
    times.append((begun, time.perf_counter()))


class Slow(nn.Module):
    """A stage of which each pass takes as long."""

    def __init__(self, seconds: float):
        super().__init__()
        self.weight, self.seconds = nn.Parameter(torch.eye(4)), seconds
        self.times: list[tuple[float, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        sleep(self.seconds, self.times)
        return Sleep.apply(x @ Sleep.apply(self.weight, self.seconds, self.times), self.seconds, self.times)


def measure(wire: Wire, schedule: str, micro_batches: int, seconds: float, steps: int) -> dict[str, Any]:
    """What this rank did in the last of some steps, and how long it was idle in each."""
    mesh = Mesh(pipeline=wire.size, watch=False)
    each = schedules.kind(schedule).each
    stage = split([Slow(seconds / each) for _ in range(each * wire.size)], mesh, schedule=schedule)
    pipeline = Pipeline(stage, mesh, lambda y, t: (y - t).square().mean(), micro_batches=micro_batches)
    batch = torch.ones(micro_batches, 4), torch.zeros(micro_batches, 4)
    idle = []
    for _ in range(steps + 1):
        wire.barrier()
        for part in stage.modules():
            if isinstance(part, Slow):
                part.times.clear()
        pipeline.step(*batch)
        times = [pair for part in stage.modules() if isinstance(part, Slow) for pair in part.times]
        busy = sum(end - begin for begin, end in times)
        idle.append((max(end for _, end in times) - min(begin for begin, _ in times)) / busy - 1)
    return {"idle": idle[1:], "actions": list(pipeline.actions), "calls": dict(pipeline.wire.calls)}


def run(ranks: int = RANKS, micro_batches: int = MICRO_BATCHES, seconds: float = SECONDS, steps: int = STEPS
        ) -> list[dict[str, Any]]:
    """Measure every schedule."""
    rows = []
    for schedule in schedules.KINDS:
        found = together(measure, ranks, schedule, micro_batches, seconds, steps)
        rows.append(row(schedule, micro_batches, seconds, found))
    return rows


def row(schedule: str, micro_batches: int, seconds: float, found: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one schedule: idle time over the time of work, of the rank that is idle most."""
    ranks = len(found)
    actions = [[action for action in one["actions"] if action.kind != "R"] for one in found]
    return {"schedule": schedule, "ranks": ranks, "micro_batches": micro_batches, "seconds": seconds,
            "stages": schedules.kind(schedule).each,
            "measured": max(statistics.median(one["idle"]) for one in found),
            "on_the_clock": clock.run(actions).idle(), "formula": figures.idle(schedule, ranks, micro_batches),
            "live": [clock.most_live(one) for one in actions]}


def report(rows: list[dict[str, Any]]) -> str:
    """The table of the figures."""
    lines = ["schedule        stages  idle/work: measured  clock   formula  activations of each rank"]
    for one in rows:
        lines.append(f"{one['schedule']:15} {one['stages']:>6}  {one['measured']:>19.1%}  {one['on_the_clock']:>5.1%}  "
                     f"{one['formula']:>7.1%}  {', '.join(map(str, one['live']))}")
    return "\n".join(lines)
