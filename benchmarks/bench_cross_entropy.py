"""Cross-entropy on the CPU, forward and backward, beside torch's; and a linear layer with its loss in chunks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.allocated import peak
from fasttrain.losses import cross_entropy, linear_cross_entropy

ROWS, CLASSES, ROUNDS = 2048, (256, 50257), 7
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FEATURES = 256  # of the hidden state under the chunked form


def passes(loss: Callable[..., Tensor], logits: Tensor, targets: Tensor, **options: Any) -> Callable[[], Any]:
    """Forward and backward, from logits that are a leaf."""
    x = logits.detach().requires_grad_()
    return lambda: torch.autograd.grad(loss(x, targets, **options), x)


def in_place(logits: Tensor, targets: Tensor) -> Callable[[], Any]:
    """The same with the derivative written over the logits."""
    x = torch.zeros((), dtype=logits.dtype, requires_grad=True)
    return lambda: torch.autograd.grad(cross_entropy(Handed.apply(logits, x), targets, inplace_backward=True), x)


class Handed(torch.autograd.Function):
    """Logits as from a model's last layer: not a leaf, and nothing of them is computed here."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad[0, 0]


def repeat(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


def row(rows: int, classes: int, dtype: str, rounds: int) -> dict[str, Any]:
    """One size: milliseconds of each, the ratio, and the bandwidth of the three passes over the logits."""
    logits = torch.randn(rows, classes).to(DTYPES[dtype])
    targets = torch.randint(0, classes, (rows,))
    copy = logits.clone()

    def restore(name: str) -> None:  # outside of the timing
        if name == "in place":
            copy.copy_(logits)

    rivals = {"fasttrain": passes(cross_entropy, logits, targets), "in place": in_place(copy, targets),
              "torch": passes(F.cross_entropy, logits, targets)}
    forward = {"fasttrain": lambda: cross_entropy(logits, targets), "torch": lambda: F.cross_entropy(logits, targets)}
    calls = max(1, 2**24 // logits.numel())  # of the smallest sizes, so many that a round is long enough to be timed
    seconds, alone = ({name: [value / calls for value in values] for name, values in harness.interleave(
        {name: partial(repeat, call, calls) for name, call in each.items()}, rounds, before=restore).items()}
        for each in (rivals, forward))
    middle = harness.medians(seconds)
    return {"rows": rows, "classes": classes, "dtype": dtype, "seconds": middle, "forward": harness.medians(alone),
            "gigabytes_per_second": 3 * logits.nbytes / middle["in place"] / 1e9,
            "ratio": {name: harness.ratio(seconds, "torch", name) for name in ("fasttrain", "in place")},
            "ratio_forward": harness.ratio(alone, "torch", "fasttrain")}


def chunked(rows: int, classes: int, dtype: str, rounds: int) -> dict[str, Any]:
    """A linear layer and its loss, forward and backward: plain with torch, and in chunks."""
    hidden = torch.randn(rows, FEATURES).to(DTYPES[dtype]).requires_grad_()
    weight = (torch.randn(classes, FEATURES) / 16).to(DTYPES[dtype]).requires_grad_()
    targets = torch.randint(0, classes, (rows,))

    def step(loss: Tensor) -> None:
        torch.autograd.grad(loss, (hidden, weight))

    rivals = {"fasttrain": lambda: step(linear_cross_entropy(hidden, weight, targets)),
              "torch": lambda: step(F.cross_entropy(hidden @ weight.T, targets))}
    memory = {name: peak(call) for name, call in rivals.items()}
    seconds = harness.interleave(rivals, rounds, warm_up=1)
    return {"rows": rows, "classes": classes, "features": FEATURES, "dtype": dtype, "memory": memory,
            "seconds": harness.medians(seconds), "ratio": harness.ratio(seconds, "torch", "fasttrain")}


def run(rows: int = ROWS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Every size, in both dtypes."""
    sizes = [row(rows, classes, dtype, rounds) for classes in CLASSES for dtype in DTYPES]
    linear = [chunked(rows // 2, CLASSES[-1], dtype, max(rounds // 2, 2)) for dtype in DTYPES]
    return {"rows": sizes, "linear": linear}


def report(figures: dict[str, Any]) -> str:
    """The tables of the figures."""
    head = "".join(f"{name:>10}" for name in ("ours", "in place", "torch"))
    lines = [f"{'rows x classes':24}{head}   GB/s  forward and backward; forward"]
    for found in figures["rows"]:
        ms = {name: f"{value * 1e3:6.2f} ms" for name, value in found["seconds"].items()}
        ratio, forward = found["ratio"], found["ratio_forward"]
        lines.append(f"{found['rows']} x {found['classes']:<11} {found['dtype']:5} {ms['fasttrain']} {ms['in place']} "
                     f"{ms['torch']} {found['gigabytes_per_second']:6.1f}  {ratio['fasttrain']['median']:.2f}x, "
                     f"in place {ratio['in place']['median']:.2f}x; {forward['median']:.2f}x")
    lines.append("a linear layer of 256 features and its loss, in chunks")
    for found in figures["linear"]:
        megabytes = {name: value / 1e6 for name, value in found["memory"].items()}
        lines.append(f"{found['rows']} x {found['classes']:<11} {found['dtype']:5} "
                     f"{found['seconds']['fasttrain'] * 1e3:7.1f} ms, torch {found['seconds']['torch'] * 1e3:7.1f} ms "
                     f"({found['ratio']['median']:.2f}x); memory {megabytes['fasttrain']:.0f} MB, torch "
                     f"{megabytes['torch']:.0f} MB")
    return "\n".join(lines)
