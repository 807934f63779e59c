"""What schedules, guards and a line of log cost the host in a step, in microseconds: all together, and apart."""

from __future__ import annotations

import io
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fasttrain.guards import LossSpikes, NonFinite
from fasttrain.optim import AdamW
from fasttrain.schedules import Scheduler, linear, warmup_cosine

BUDGET_US = 50.0


def parts() -> dict[str, Callable[[int], Any]]:
    """What a step calls, by name, each a function of the step. The peer, torch's schedules, is beside ours."""
    loss, norm, found = torch.tensor(2.0), torch.tensor(1.0), torch.tensor(False)
    optimizers = [AdamW([{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(2)]) for _ in range(3)]
    scheduler = Scheduler(optimizers[0], lr=warmup_cosine(10**6, 1000), weight_decay=linear(10**6))
    rates = Scheduler(optimizers[1], lr=warmup_cosine(10**6, 1000))
    theirs = torch.optim.lr_scheduler.SequentialLR(optimizers[2], [
        torch.optim.lr_scheduler.LinearLR(optimizers[2], 0.1, total_iters=1000),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[2], 10**6)], [1000])
    optimizers[2]._opt_called = True  # else torch warns about the order of calls
    guard, spikes, log = NonFinite(), LossSpikes(), io.StringIO()

    def watch(step: int) -> Any:
        return guard.watch(step, found=found, loss=loss, norm=norm, batch=step)

    def spike(step: int) -> Any:
        return spikes.update(step, 2.0 + 1e-3 * (step * 7 % 11), step)

    def line(step: int) -> None:
        log.seek(0)
        log.write(json.dumps({"event": "train", "step": step, "loss": 2.0, "lr": rates.get_last_lr()[0]}) + "\n")

    def everything(step: int) -> None:
        judged = watch(step)
        if judged is not None:
            spike(step)
            line(step)
        scheduler.step()

    return {"all of ours": everything, "Scheduler, learning rate": lambda step: rates.step(),
            "Scheduler, with weight decay": lambda step: scheduler.step(), "NonFinite.watch": watch,
            "LossSpikes.update": spike, "a line of JSON": line,
            "torch's SequentialLR of warmup and cosine": lambda step: theirs.step()}


def run(rounds: int = 25, steps: int = 400) -> list[dict[str, Any]]:
    """Median over rounds of the mean over steps, of numbers that lie on the CPU; parts in turn within a round."""
    made = parts()
    for call in made.values():  # windows are full, nothing is called for the first time
        for step in range(300):
            call(step)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(rounds):
        for name in [*made][turn % len(made):] + [*made][:turn % len(made)]:
            call = made[name]
            start = time.perf_counter()
            for step in range(300, 300 + steps):
                call(step)
            seconds[name].append((time.perf_counter() - start) / steps)
    return [{"part": name, "us": statistics.median(values) * 1e6, "low": min(values) * 1e6, "high": max(values) * 1e6}
            for name, values in seconds.items()]


def report(figures: list[dict[str, Any]]) -> str:
    """The table of the figures."""
    lines = [f"{row['part']:45}{row['us']:8.1f} us" for row in figures]
    return "\n".join([*lines, f"{'to show, for all of ours':45}{BUDGET_US:8.1f} us at most"])
