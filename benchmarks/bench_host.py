"""What a step costs the host per parameter, apart from the arithmetic: parameters of one element."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from benchmarks import harness
from fasttrain.optim import AdamW

RIVALS = {"fasttrain": AdamW, "torch fused": lambda params: torch.optim.AdamW(params, fused=True),
          "torch foreach": lambda params: torch.optim.AdamW(params, foreach=True)}


def run(counts: tuple[int, ...] = (10, 1000, 10000), rounds: int = 15) -> list[dict[str, Any]]:
    """Microseconds per parameter with gradients that stay and gradients that are new on every step."""
    figures = []
    for count in counts:
        made: dict[str, Any] = {}
        for name, optimizer in RIVALS.items():
            params = [torch.nn.Parameter(torch.randn(1)) for _ in range(count)]
            for p in params:
                p.grad = torch.randn(1)
            made[name] = (params, optimizer(params))
        for fresh in (False, True):

            seconds = harness.interleave({name: optimizer.step for name, (_, optimizer) in made.items()},
                                         rounds * (20 if count < 100 else 1),
                                         before=partial(renew, made) if fresh else None)
            figures.append({"parameters": count, "fresh": fresh,
                            "us_per_parameter": {n: s / count * 1e6 for n, s in harness.medians(seconds).items()}})
        params = made["fasttrain"][0]
        figures.append({"parameters": count, "remains": remains(params)})
    return figures


def renew(made: dict[str, Any], name: str) -> None:
    """Give every parameter a gradient at another address."""
    for p in made[name][0]:
        p.grad = torch.ones_like(p)


def remains(params: list[torch.nn.Parameter]) -> dict[str, float]:
    """Microseconds per parameter of what no step can leave out, each read from Python."""
    def each(read: Any) -> float:
        times = []
        for _ in range(9):
            start = time.perf_counter()
            for p in params:
                read(p)
            times.append(time.perf_counter() - start)
        return sorted(times)[4] / len(params) * 1e6

    return {"p.grad": each(lambda p: p.grad), "p.grad.data_ptr()": each(lambda p: p.grad.data_ptr()),
            "all metadata of p.grad": each(lambda p: (p.grad.data_ptr(), p.grad.dtype, p.grad.device, p.grad.shape,
                                                      p.grad.stride()))}


def report(figures: list[dict[str, Any]]) -> str:
    """The table of the figures."""
    lines = []
    for row in figures:
        if "remains" in row:
            parts = ", ".join(f"{name} {us:.2f}" for name, us in row["remains"].items())
            lines.append(f"{row['parameters']:6} parameters, read from Python: {parts} us each")
        else:
            parts = ", ".join(f"{name} {us:.2f}" for name, us in row["us_per_parameter"].items())
            grads = "fresh gradients" if row["fresh"] else "same gradients"
            lines.append(f"{row['parameters']:6} parameters, {grads}: {parts} us per parameter")
    return "\n".join(lines)
