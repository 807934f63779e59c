"""States on the host: backward and step, ours at once and on arrival, beside torchao's and beside ours on the GPU.

The backward pass is one that costs next to nothing: it hands out gradients that are there. So this is what a step adds
where no other work of the GPU hides it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter

from benchmarks.gpu import shapes
from benchmarks.gpu.bench import OURS, Bench, Make, Step
from benchmarks.gpu.recipes import OPTIONS
from fasttrain.optim import AdamW


def stepping(make: Callable[[list[Parameter]], Any], arrival: bool = False) -> Make:
    """Backward and step of an optimizer with parameters of its own: some hang hooks on them."""
    def maker(given: list[Parameter]) -> Step:
        params = [Parameter(p.detach().clone()) for p in given]
        grads = [torch.randn_like(p) for p in params]
        optimizer = make(params)
        if arrival:
            optimizer.step_on_arrival()

        def step() -> None:
            torch.autograd.backward(params, grads)
            optimizer.step()
            optimizer.zero_grad()
        return step
    return maker


def torchao(params: list[Parameter]) -> Any:
    from torchao.optim import CPUOffloadOptimizer

    return CPUOffloadOptimizer(params, torch.optim.AdamW, fused=True, **OPTIONS)


MAKERS: dict[str, Make] = {
    OURS: stepping(lambda params: AdamW(params, **OPTIONS, offload=True)),
    "fasttrain on arrival": stepping(lambda params: AdamW(params, **OPTIONS, offload=True), arrival=True),
    "fasttrain, split master": stepping(lambda params: AdamW(params, **OPTIONS, offload=True, master="split")),
    "fasttrain on the GPU": stepping(lambda params: AdamW(params, **OPTIONS)),
    "torchao": stepping(torchao),
}


def run(bench: Bench) -> list[dict[str, Any]]:
    """AdamW on bf16 parameters, as many as a few seconds of the host's memory allow."""
    kept, note = bench.fitting(shapes.equal(60, 240_000_000 // 60), 48)
    rivals, failed = bench.rivals(MAKERS, [bench.parameters(kept, torch.bfloat16)])
    row = bench.row("AdamW, bf16, states on the host: 2.4e8 in 60 tensors", rivals, section="offload", ahead=False,
                    budget=15.0, tensors=len(kept), absent=failed)
    memory = {name: f"{value:.1f}" for name, value in row["memory"].items()}
    said = "B a parameter on the GPU, weights and gradients included: " + ", ".join(
        f"{name} {value}" for name, value in memory.items()) if memory else ""
    return [row | {"note": "; ".join(filter(None, (said, note)))}]
