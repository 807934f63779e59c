"""Whose threads should a step run on? Steps that follow work of torch, on torch's OpenMP threads and on our pool.

The two cannot live in one process: each kind and number of threads is a process of its own, in turn.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from typing import Any

CODE = """
import json, statistics, sys, time, torch
from fasttrain.optim import AdamW
tensors, elements, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
params = [torch.nn.Parameter(torch.randn(elements)) for _ in range(tensors)]
for p in params: p.grad = torch.randn(elements)
optimizer, a, times = AdamW(params), torch.randn(512, 512), []
for _ in range(60):
    a = torch.tanh(a @ a)  # wakes torch's threads, which then spin for a while
    start = time.perf_counter()
    optimizer.step()
    times.append(time.perf_counter() - start)
print(json.dumps(statistics.median(times[10:])))
"""
WORK = ((1000, 256), (1000, 4096), (1, 1 << 24))


def run(rounds: int = 3) -> list[dict[str, Any]]:
    """Median seconds of a step for every work, kind and number of threads."""
    cores = len(os.sched_getaffinity(0))
    cases = [(kind, threads) for threads in (1, cores, 2 * cores) for kind in ("gomp", "pool")]
    figures = []
    for tensors, elements in WORK:
        seconds: dict[str, list[float]] = {}
        for _ in range(rounds):
            for kind, threads in cases:
                arguments = [sys.executable, "-c", CODE, str(tensors), str(elements), str(threads)]
                done = subprocess.run(arguments, check=True, capture_output=True, text=True,
                                      env={**os.environ, "FASTTRAIN_THREADING": kind})
                seconds.setdefault(f"{kind}, {threads}", []).append(json.loads(done.stdout))
        figures.append({"work": f"{tensors:,} x {elements:,}", "cores": cores,
                        "seconds": {case: statistics.median(values) for case, values in seconds.items()}})
    return figures


def report(figures: list[dict[str, Any]]) -> str:
    """The table of the figures."""
    return "\n".join(f"{row['work']:18} on {row['cores']} cores, ms: "
                     + ", ".join(f"{case} threads {value * 1e3:.2f}" for case, value in row["seconds"].items())
                     for row in figures)
