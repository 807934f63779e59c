"""What storages cost in quality: the main job, smaller, with the weights, master and states kept in each way."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import main_job
from fasttrain.precision.storage import PRESETS
from fasttrain.train import text
from fasttrain.train.config import TrainConfig

JOB = dict(steps=300, batch=8, sequence=128, layers=2, width=128, heads=4, ngrams=4, rows=4096, warmup=100)
SEEDS = (0, 1, 2)
PARTIAL = Path(__file__).parents[1] / "build/convergence.jsonl"  # one line a run; an interruption loses nothing
WORSE = "worse than fp32 by more than the seeds differ"
LONG = {"betas": (0.9, 0.999)}


@dataclass(frozen=True)
class Row:
    """One way to keep the weights.

    Attributes:
        options: of the optimizer.
        bf16: whether the parameters are bfloat16, else float32.
        baseline: the row it is measured against.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    bf16: bool = True
    baseline: str = "fp32"


def rows_of_long_memory() -> tuple[Row, ...]:
    """With AdamW's own second beta, which retains so much that narrow states are rounded stochastically."""
    base = "fp32, beta2 0.999"
    return (Row(base, LONG, bf16=False, baseline=base), Row("bf16, beta2 0.999", LONG, baseline=base),
            *(Row(f"{name}, beta2 0.999", {"storage": name, **LONG}, baseline=base) for name in ("8-byte", "5-byte")))


ROWS = (Row("fp32", bf16=False), Row("bf16"), *(Row(name, {"storage": name}) for name in PRESETS),
        Row("kahan", {"master": "kahan"}), Row("split, fp8 states", {"master": "split", "state_dtype": "e4m3"}),
        *rows_of_long_memory())


def run(job: dict[str, Any] = JOB, rows: Sequence[Row] = ROWS, seeds: Sequence[int] = SEEDS,
        partial: Path = PARTIAL, source: Path | None = None) -> dict[str, Any]:
    """Bits per byte of the held-out text after each run; runs that `partial` has are not made again.

    Arguments:
        source: of the text, as in `fasttrain.train.text.load`.
    """
    config = TrainConfig(processes=1, **job)
    read = text.load(source, config.held_out, config.sequence)
    partial.parent.mkdir(parents=True, exist_ok=True)
    done = dict(map(_entry, partial.read_text().splitlines())) if partial.exists() else {}

    def key_of(row: Row, seed: int) -> str:
        return json.dumps([job, asdict(row), seed, torch.__version__, read.sha256])

    for seed in seeds:
        for row in rows:
            key = key_of(row, seed)
            if key not in done:
                done[key] = _bits(TrainConfig(processes=1, seed=seed, **job), read, row)
                with partial.open("a") as lines:
                    lines.write(json.dumps([key, done[key]]) + "\n")
                print(f"  seed {seed}  {row.name:24} {done[key]:.4f}", flush=True)
    bits = {row.name: [done[key_of(row, seed)] for seed in seeds] for row in rows}
    partial.unlink()
    return {"job": {**job, "parameters": _size(config), "held_out_bytes": len(read.held_out)}, "seeds": list(seeds),
            "rows": [_figure(row, bits) for row in rows]}


def _entry(line: str) -> tuple[str, float]:
    key, value = json.loads(line)
    return key, value


def _bits(config: TrainConfig, read: text.Text, row: Row) -> float:
    model, optimizer = main_job.make(config, torch.bfloat16 if row.bf16 else torch.float32,
                                     {**row.options, "seed": config.seed})
    main_job.train(config, read, model, optimizer)
    return main_job.bits_per_byte(config, read, model)


def _size(config: TrainConfig) -> int:
    return sum(p.numel() for p in main_job.make(config, torch.float32, {})[0].parameters())


def _figure(row: Row, bits: dict[str, list[float]]) -> dict[str, Any]:
    own, base = bits[row.name], bits[row.baseline]
    over = [a - b for a, b in zip(own, base, strict=True)]
    return {"row": row.name, "baseline": row.baseline, "bits": own, "mean": statistics.mean(own),
            "spread": max(own) - min(own), "over": over,
            "worse": statistics.mean(over) > max(base) - min(base)}


def label(row: dict[str, Any]) -> str:
    """What the table says of a row."""
    return "the baseline" if row["row"] == row["baseline"] else WORSE if row["worse"] else ""


def report(figures: dict[str, Any]) -> str:
    """The table of the figures."""
    return "\n".join(f"{row['row']:24} {row['mean']:.4f} bits/byte, seeds differ by {row['spread']:.4f}; "
                     f"{statistics.mean(row['over']):+.4f} ({min(row['over']):+.4f} to {max(row['over']):+.4f})  "
                     f"{label(row)}" for row in figures["rows"])
