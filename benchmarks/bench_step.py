"""AdamW in fp32 on the CPU against torch's fused step, from one huge tensor to thousands of tiny ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import harness
from benchmarks.bench_host import renew
from fasttrain.kernels import native
from fasttrain.kernels.trace import trace
from fasttrain.optim import AdamW

# tensors, elements of each, rounds, what was aimed at
WORK = ((1, 1 << 26, 9, 0.98), (1000, 65536, 9, 1.2), (1000, 256, 41, 5.0), (10000, 1000, 15, 5.0))
BYTES = trace(AdamW.rules[0]).bytes_per_element(4, 4, 4)


def make(tensors: int, elements: int, optimizer: Callable[..., torch.optim.Optimizer]) -> tuple[list, Any]:
    """Parameters with gradients, and their optimizer after its first step."""
    params = [torch.nn.Parameter(torch.randn(elements)) for _ in range(tensors)]
    for p in params:
        p.grad = torch.randn(elements)
    made = optimizer(params)
    made.step()
    return params, made


def rivals() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """Ours first; DeepSpeed where it is installed."""
    found: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "fasttrain": AdamW, "torch fused": lambda params: torch.optim.AdamW(params, fused=True)}
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError:
        return found
    return {**found, "deepspeed": lambda params: DeepSpeedCPUAdam(params, adamw_mode=True)}


def update_of_streams(words: int) -> Callable[[], int]:
    """The ceiling of a step: an in-place update of AdamW's four streams, with nearly no arithmetic."""
    streams = [torch.zeros(words, dtype=torch.int32).random_() for _ in range(4)]
    # The streams live as long as the function that is returned.
    return lambda: native.module().update_streams([s.data_ptr() for s in streams], words, torch.get_num_threads())


def run() -> list[dict[str, Any]]:
    """Measure every row."""
    figures = []
    for tensors, elements, rounds, aim in WORK:
        made = {name: make(tensors, elements, optimizer) for name, optimizer in rivals().items()}
        timed = {name: optimizer.step for name, (_, optimizer) in made.items()}
        large = tensors * elements >= 1 << 24  # else the ceiling would be that of a cache
        if large:
            timed["update of four streams"] = update_of_streams(tensors * elements)
        for fresh in (False,) if large else (False, True):
            seconds = harness.interleave(timed, rounds, before=partial(renew, made) if fresh else None)
            figures.append({
                "work": f"AdamW fp32, {tensors:,} x {elements:,}" + (", fresh gradients" if fresh else ""),
                "seconds": harness.medians(seconds), "aim": aim, "bytes": BYTES * tensors * elements,
                "ratio": harness.ratio(seconds, "torch fused", "fasttrain"),
                "of_ceiling": harness.ratio(seconds, "update of four streams", "fasttrain") if large else None})
        del made, timed
    return figures


def report(figures: list[dict[str, Any]]) -> str:
    """The table of the figures."""
    lines = [f"{'work':46} {'ours':>10} {'torch':>10} {'ratio':>6} {'(quartiles)':>13} {'aim':>5} {'of ceiling':>10}"]
    for row in figures:
        ours, theirs = row["seconds"]["fasttrain"] * 1e3, row["seconds"]["torch fused"] * 1e3
        spread = f"{row['ratio']['low']:.2f}-{row['ratio']['high']:.2f}"
        lines.append(f"{row['work']:46} {ours:7.2f} ms {theirs:7.2f} ms {row['ratio']['median']:5.2f}x {spread:>13} "
                     f"{row['aim']:4}x" + (f" {row['of_ceiling']['median']:9.0%}" if row["of_ceiling"] else ""))
    return "\n".join(lines)
