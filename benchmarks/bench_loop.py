"""Thousands of small tensors in a real loop: backward, step, zero_grad(set_to_none=True)."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks import harness
from benchmarks.bench_step import rivals


class Loop:
    """A model of many small parameters, each used once; `step` times the optimizer alone inside the whole iteration."""

    def __init__(self, tensors: int, elements: int, optimizer: Any):
        self.params = [torch.nn.Parameter(torch.randn(elements)) for _ in range(tensors)]
        self.optimizer = optimizer(self.params)
        self.inside: list[float] = []  # seconds of each step

    def iterate(self) -> None:
        loss = torch.stack([p.square().sum() for p in self.params]).sum()
        loss.backward()
        start = time.perf_counter()
        self.optimizer.step()
        self.inside.append(time.perf_counter() - start)
        self.optimizer.zero_grad(set_to_none=True)


def run(tensors: int = 1000, elements: int = 256, rounds: int = 31) -> list[dict[str, Any]]:
    """The optimizer's share of the loop, and the whole loop."""
    loops = {name: Loop(tensors, elements, optimizer) for name, optimizer in rivals().items()}
    whole = harness.interleave({name: loop.iterate for name, loop in loops.items()}, rounds)
    inside = {name: loop.inside[-rounds:] for name, loop in loops.items()}
    return [{"work": f"AdamW fp32, {tensors:,} x {elements:,}, {what}", "seconds": harness.medians(seconds),
             "ratio": harness.ratio(seconds, "torch fused", "fasttrain")}
            for what, seconds in (("step inside a loop with backward", inside), ("the whole loop", whole))]


def report(figures: list[dict[str, Any]]) -> str:
    """The table of the figures."""
    return "\n".join(f"{row['work']:60} {row['seconds']['fasttrain'] * 1e3:7.2f} ms "
                     f"{row['seconds']['torch fused'] * 1e3:7.2f} ms {row['ratio']['median']:5.2f}x" for row in figures)
