"""The ceiling: what a copy from device memory to device memory moves, read plus written."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.gpu.bench import Bench


def run(bench: Bench) -> list[dict[str, Any]]:
    """Bytes per second of a copy of 4 GiB, or of what fits; kept in the bench for all that follows."""
    size = (1 << 16) if bench.dry else min(1 << 32, bench.free() // 3) // 16 * 16
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    times = [bench.seconds(lambda: target.copy_(source), 1e-3) for _ in range(bench.rounds)]
    bench.ceiling = 2 * size / statistics.median(times)
    return [{"work": "copy", "section": "ceiling", "unit": "TB/s", "value": {"copy": bench.ceiling / 1e12},
             "rounds": len(times), "bytes_copied": size, "bytes_per_second": bench.ceiling}]
