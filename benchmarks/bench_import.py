"""Seconds that `import fasttrain.optim` adds to `import torch`, in fresh processes, one after the other."""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import Any

CODE = "import time; t = time.perf_counter(); import torch; u = time.perf_counter(); {}; v = time.perf_counter(); " \
       "print(u - t, v - u)"
WORK = {"import fasttrain": "import fasttrain",
        "from fasttrain.optim import AdamW": "from fasttrain.optim import AdamW",
        "the same and the compiled module": "from fasttrain.optim import AdamW; from fasttrain.kernels import native; "
                                            "native.module()"}


def run(rounds: int = 7) -> list[dict[str, Any]]:
    """Medians over fresh processes."""
    figures = []
    for work, code in WORK.items():
        timed = [subprocess.run([sys.executable, "-c", CODE.format(code)], check=True, capture_output=True, text=True)
                 .stdout.split() for _ in range(rounds + 1)][1:]
        figures.append({"work": work, "torch": statistics.median(float(t) for t, _ in timed),
                        "added": statistics.median(float(u) for _, u in timed)})
    return figures


def report(figures: list[dict[str, Any]]) -> str:
    """The table of the figures."""
    return "\n".join(f"{row['work']:40} adds {row['added']:.3f} s to {row['torch']:.2f} s of import torch"
                     for row in figures)
