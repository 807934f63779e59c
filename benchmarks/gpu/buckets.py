"""What surrounds the step: the norm of all gradients, and gradients packed into a bucket."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu import shapes
from benchmarks.gpu.bench import OURS, Bench, Rival
from fasttrain.kernels import norm
from fasttrain.kernels.pack import Slots


def run(bench: Bench) -> list[dict[str, Any]]:
    """Norm and pack of the gradients of GPT-2 124M, fp32."""
    kept, note = bench.fitting(shapes.gpt2(), 24)
    elements = shapes.count(kept)
    sets = [[torch.randn(shape, device=bench.device) for shape in kept] for _ in range(bench.copies(4 * elements))]
    rivals = {OURS: Rival(OURS, [lambda given=given: norm.total(norm.squares(given)[0]) for given in sets]),
              "torch": Rival("torch", [lambda given=given: torch.nn.utils.get_total_norm(given) for given in sets])}
    rows = [bench.row("norm and non-finite flag: GPT-2 124M, fp32", rivals, section="around", elements=elements, each=4,
                      budget=4.0, note=note, tensors=len(kept))]

    starts, room = [], 0
    for shape in kept:
        starts.append(room)
        room += -(-shapes.count([shape]) // 64) * 64
    ours, theirs = (Slots(torch.empty(room, dtype=torch.bfloat16, device=bench.device), sets[0], starts) for _ in "ab")

    def foreach(given: list[Any]) -> None:
        torch._foreach_copy_(theirs.views, given)
        torch._foreach_mul_(theirs.views, 0.5)

    rivals = {OURS: Rival(OURS, [lambda given=given: ours.pack_all(given, 0.5) for given in sets]),
              "torch foreach": Rival("torch foreach", [lambda given=given: foreach(given) for given in sets])}
    rows.append(bench.row("pack, scaled, fp32 to a bf16 bucket: GPT-2 124M", rivals, section="around",
                          elements=elements, each=6, budget=4.0, note=note, tensors=len(kept)))
    return rows
