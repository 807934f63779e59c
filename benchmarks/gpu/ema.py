"""An average of the weights: what it adds to a step, ours inside of the pass, torch's after it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from benchmarks.gpu import shapes
from benchmarks.gpu.bench import OURS, Bench, Step
from benchmarks.gpu.recipes import OPTIONS
from fasttrain.optim import AdamW


def torch_fused(params: list[Parameter]) -> Step:
    return torch.optim.AdamW(params, **OPTIONS, fused=True).step


def torch_average(params: list[Parameter]) -> Step:
    optimizer = torch.optim.AdamW(params, **OPTIONS, fused=True)
    averages = [p.detach().clone() for p in params]

    def step() -> None:
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, params, 0.001)
    return step


MAKERS = {OURS: lambda params: AdamW(params, **OPTIONS, ema_decay=0.999).step,
          "fasttrain without": lambda params: AdamW(params, **OPTIONS).step,
          "torch fused + lerp": torch_average, "torch fused without": torch_fused}


def run(bench: Bench) -> list[dict[str, Any]]:
    """Steps with and without an average on 5e8 elements, and the ratio of what the average adds."""
    kept, note = bench.fitting(shapes.equal(300, 500_000_000 // 300), 56)
    models = [bench.parameters(kept, torch.float32)]
    rivals, _ = bench.rivals(MAKERS, models)
    row = bench.row("AdamW + EMA, fp32: 5e8 in 300 tensors", rivals, section="ema", elements=shapes.count(kept),
                    each=36, tensors=len(kept))
    value = row["value"]
    ours = value[OURS] - value["fasttrain without"]
    theirs = value["torch fused + lerp"] - value["torch fused without"]
    row["added_ms"] = {OURS: ours, "torch": theirs}
    shares = f"adds {ours:.3f} ms, torch's {theirs:.3f}: {ours / theirs:.0%}" if theirs > 0 else "torch's adds nothing"
    return [row | {"note": "; ".join(filter(None, (shares, note)))}]

