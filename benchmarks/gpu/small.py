"""Ten thousand tensors of a thousand elements: what a step costs where no tensor is large."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu import peers, shapes
from benchmarks.gpu.bench import OURS, Bench
from benchmarks.gpu.recipes import OPTIONS
from fasttrain.optim import AdamW

PEERS = ("torch fused", "torch foreach", "apex", "TransformerEngine")


def run(bench: Bench) -> list[dict[str, Any]]:
    """From an idle device, host included; and the device alone."""
    wanted = shapes.equal(20 if bench.dry else 10_000, 1000)
    models = [bench.parameters(wanted, torch.float32) for _ in range(bench.copies(8 * shapes.count(wanted)))]
    theirs, absent = peers.found({name: peers.FP32[name] for name in PEERS})
    launches = 0

    def ours(params: list[Any]) -> Any:
        optimizer = AdamW(params, **OPTIONS)

        def step() -> None:
            nonlocal launches
            optimizer.step()
            launches = optimizer.last_step.launches
        return step

    rivals, failed = bench.rivals({OURS: ours, **theirs}, models)
    rows = []
    for what, ahead in (("host and device", False), ("device alone", True)):
        row = bench.row(f"10,000 tensors of 1,000, fp32: {what}", rivals, section="small", each=28,
                        elements=shapes.count(wanted), ahead=ahead, budget=8.0, absent=absent | failed,
                        tensors=len(wanted))
        rows.append(row | {"launches": launches, "note": f"{launches} launches"})
    return rows
