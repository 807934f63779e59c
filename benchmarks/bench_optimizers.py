"""Every optimizer of torch.optim in fp32 on the CPU against its own fastest implementation in torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

import fasttrain.optim
from benchmarks import harness

NAMES = ("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop",
         "SGD", "Muon")
OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}}
TENSORS, ROUNDS = 100, 5
SHAPE, SHAPE_OF_MUON = (640, 1024), (256, 256)


def rivals(name: str) -> dict[str, Callable[[list], torch.optim.Optimizer]]:
    """Ours, and torch's implementations that this optimizer has."""
    theirs, options = getattr(torch.optim, name), OPTIONS.get(name, {})
    found: dict[str, Callable[[list], torch.optim.Optimizer]] = {
        "fasttrain": lambda params: getattr(fasttrain.optim, name)(params, **options)}
    accepted = inspect.signature(theirs).parameters
    for kind in ("foreach", "fused"):
        if kind in accepted:
            found[f"torch {kind}"] = lambda params, kind=kind: theirs(params, **options, **{kind: True})
    if len(found) == 1:
        found["torch"] = lambda params: theirs(params, **options)
    return found


def make(optimizer: Callable[[list], torch.optim.Optimizer], shape: tuple[int, int]) -> Callable[[], Any]:
    """The step of an optimizer whose states are there."""
    params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(TENSORS)]
    for p in params:
        p.grad = torch.randn(shape)
    made = optimizer(params)
    made.step()
    return made.step


def run() -> list[dict[str, Any]]:
    """Measure every row."""
    figures = []
    for name in NAMES:
        shape = SHAPE_OF_MUON if name == "Muon" else SHAPE
        seconds = harness.interleave({kind: make(rival, shape) for kind, rival in rivals(name).items()}, ROUNDS)
        middle = harness.medians(seconds)
        best = min((kind for kind in middle if kind != "fasttrain"), key=middle.__getitem__)
        figures.append({"work": f"{name}, {TENSORS} x {shape[0]} x {shape[1]}", "best": best, "seconds": middle,
                        "ratio": harness.ratio(seconds, best, "fasttrain")})
    return figures


def report(figures: list[dict[str, Any]]) -> str:
    """The table of the figures."""
    lines = [f"{'work':30} {'ours':>10} {'torch':>11} {'ratio':>6} {'(quartiles)':>13}  torch's best"]
    for row in figures:
        ours, theirs = row["seconds"]["fasttrain"] * 1e3, row["seconds"][row["best"]] * 1e3
        spread = f"{row['ratio']['low']:.2f}-{row['ratio']['high']:.2f}"
        lines.append(f"{row['work']:30} {ours:7.2f} ms {theirs:8.2f} ms {row['ratio']['median']:5.2f}x {spread:>13}  "
                     f"{row['best'].removeprefix('torch').strip() or 'single'}")
    return "\n".join(lines)
