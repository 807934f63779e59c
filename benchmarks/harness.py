"""Timing that can be trusted on a noisy machine: rivals in turn within one run, medians, ratios round by round."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import date, datetime
from pathlib import Path
from typing import Any

import torch

from fasttrain.kernels import native

RESULTS = Path(__file__).parent / "results"


def interleave(rivals: Mapping[str, Callable[[], Any]], rounds: int, before: Callable[[str], None] | None = None,
               warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each rival in each round; every round runs all of them, in an order that rotates.

    Arguments:
        before: called with the rival's name outside of the timing, just before each call.
    """
    names = list(rivals)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warm_up, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            if before is not None:
                before(name)
            start = time.perf_counter()
            rivals[name]()
            elapsed = time.perf_counter() - start
            if turn >= 0:
                seconds[name].append(elapsed)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each rival."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(seconds: Mapping[str, list[float]], peer: str, ours: str) -> dict[str, float]:
    """Peer over ours, round by round: median and quartiles. Above 1, ours is faster."""
    values = [theirs / mine for theirs, mine in zip(seconds[peer], seconds[ours], strict=True)]
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high}


def git(*arguments: str) -> str:
    """What git prints; nothing where this is no checkout."""
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()


def commit() -> str:
    """The commit that is checked out, marked if it was changed; nothing where this is no checkout."""
    found = git("rev-parse", "--short", "HEAD")
    if git("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results"):  # but for results being written
        found += "-dirty"
    return found


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())
    return {"date": date.today().isoformat(), "commit": commit(), "processor": model,
            "threads": torch.get_num_threads(), "isa": native.module().isa(), "python": platform.python_version(),
            "torch": torch.__version__, "threading": native.module().threading().split(":")[0]}


def save(name: str, figures: Any, on: dict[str, Any] | None = None, folder: Path = RESULTS) -> Path:
    """Write one dated JSON file of results; older ones stay.

    Arguments:
        on: what they were measured on, if it is not this machine's processor.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"{datetime.now():%Y-%m-%dT%H%M}-{name}.json"
    path.write_text(json.dumps({"machine": machine() if on is None else on, "figures": figures}, indent=1) + "\n")
    return path
