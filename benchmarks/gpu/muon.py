"""Muon on the matrices of GPT-2 124M and of a model of 1B parameters, against torch.optim.Muon."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import fasttrain.optim
from benchmarks.gpu import shapes
from benchmarks.gpu.bench import OURS, Bench

MAKERS = {OURS: lambda params: fasttrain.optim.Muon(params, lr=1e-3).step,
          "torch": lambda params: torch.optim.Muon(params, lr=1e-3).step}
WORK = {"GPT-2 124M": shapes.gpt2_matrices(), "1B": shapes.llama_1b()}


def operations(kept: list[shapes.Shape]) -> float:
    """Floating-point operations of five Newton-Schulz iterations, every product counted whole."""
    found = 0.0
    for a, b in kept:
        small, large = sorted((a, b))
        found += 5 * 2 * (2 * small * small * large + small**3)
    return found


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Both lists of shapes."""
    for name, wanted in WORK.items():
        kept, note = bench.fitting(wanted, 40)
        rivals, _ = bench.rivals(MAKERS, [bench.parameters(kept, torch.float32)])
        row = bench.row(f"Muon, fp32: the {len(kept)} matrices of {name}", rivals, section="muon", budget=6.0,
                        tensors=len(kept))
        rate = operations(kept) / row["value"][OURS] / 1e9
        said = f"{rate:.0f} TFLOP/s, every product counted whole"
        yield row | {"tflops": rate, "note": "; ".join(filter(None, (said, note)))}
        del rivals
