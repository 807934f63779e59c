"""What 8 bits on the wire lose: the error of codes on gradients of the main job after 60 steps, beside other codes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import main_job
from benchmarks.bench_codes import SIGNED, Coder, in_blocks, ours
from fasttrain.data import Windows
from fasttrain.precision.codecs import NUMBER
from fasttrain.train import text
from fasttrain.train.config import TrainConfig
from fasttrain.train.objective import loss_of

CODES: dict[str, Coder] = {
    **{name: partial(ours, NUMBER[name]) for name in ("bf16", "int8", "e4m3", "e5m2")},
    **{name: partial(in_blocks, levels, 256, False) for name, (bits, levels) in SIGNED.items() if bits == 8}}


def error(gradients: list[torch.Tensor], code: Coder) -> float:
    """Relative L2 error over all of them together."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    return ((code(flat).double() - flat.double()).norm() / flat.double().norm()).item()


def run(steps: int = 60, source: Path | None = None, **job: Any) -> list[dict[str, Any]]:
    """Train, then code one more gradient as a bucket; `source` is that of the text, as in `fasttrain.train.text.load`.
    """
    config = TrainConfig(processes=1, **job)
    read = text.load(source, config.held_out, config.sequence)
    model, optimizer = main_job.make(config, torch.float32, {})
    main_job.train(config, read, model, optimizer, steps)
    batch = Windows(read.train, config.sequence, config.seed).batch(steps * config.batch, config.batch)
    loss_of(model, torch.from_numpy(batch).long()).backward()
    kinds: dict[str, list[torch.Tensor]] = {"matrices": [], "embeddings": []}
    for name, p in model.named_parameters():
        assert p.grad is not None
        kinds["embeddings" if "embedding" in name else "matrices"].append(p.grad)
    return [{"code": name, "ours": name in NUMBER, "steps": steps,
             "error": {kind: error(gradients, code) for kind, gradients in kinds.items()}}
            for name, code in CODES.items()]


def report(figures: list[dict[str, Any]]) -> str:
    """The table of the figures."""
    return "\n".join(f"{row['code']:10} {'ours' if row['ours'] else '    '}  " +
                     ", ".join(f"{kind} {value:.2%}" for kind, value in row["error"].items()) for row in figures)
