"""``--dry-run``: a few steps, and from them what the whole run would take."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from torch import Tensor

from fasttrain.train.config import TrainConfig
from fasttrain.train.usage import GB, weights_table

STEPS = 4  # of which the first, in which memory is allocated, does not count
Record = dict[str, Any]


def dry_run(config: TrainConfig, model: Any, optimizer: Any, steps: Callable[[Callable[[Record], None]], Any],
            look: Callable[[], Record]) -> Record:
    """Make the steps, validate once, and say what that took and what the run would.

    Arguments:
        model: what is called with a batch.
        steps: makes `STEPS` steps, and gives the record of each to what it is called with.
        look: a quick validation.

    Returns:
        ``{"event": "dry-run", "step", "bytes", "memory_gb", "step_s", "validation_s", "run_s", "checkpoint_bytes"}``:
        bytes of parameters, gradients, buffers and states on this process; the seconds of a step (the median), of a
        quick validation, and of the whole run, its last validation not counted; bytes of a checkpoint of all processes.
    """
    seen: list[Record] = []
    steps(seen.append)
    step_s = median(config.batch * config.sequence / record["tokens_per_s"] for record in seen[1:])
    begun = time.perf_counter()
    look()
    validation_s = time.perf_counter() - begun
    sizes = weights_table(model) | {"states": states_bytes(optimizer)}
    shared = config.processes if config.zero else 1
    whole = sizes["parameters"] * (config.processes if config.zero == 3 else 1) + sizes["states"] * shared
    return {"event": "dry-run", "step": STEPS, "bytes": sizes, "memory_gb": seen[-1]["peak_gb"], "step_s": step_s,
            "validation_s": validation_s, "checkpoint_bytes": whole,
            "run_s": config.steps * step_s + config.steps // config.validate_every * validation_s}


def states_bytes(optimizer: Any) -> int:
    """Bytes of the states that an optimizer keeps on this process.

    Example:
        >>> import torch
        >>> p = torch.nn.Parameter(torch.ones(10))
        >>> optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
        >>> p.grad = torch.ones(10)
        >>> optimizer.step()
        >>> states_bytes(optimizer)
        40
    """
    found = [value for state in getattr(optimizer, "inner", optimizer).state.values() for value in state.values()
             if isinstance(value, Tensor)]
    return sum((value.to_local() if hasattr(value, "to_local") else value).nbytes for value in found)


def describe(record: Record, config: TrainConfig) -> str:
    """The estimate as text for a terminal."""
    sizes = "\n".join(f"  {name:<12}{size / GB:10.3f} GiB" for name, size in record["bytes"].items())
    seconds = record["run_s"]
    hours = f"{seconds:,.0f} s" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
    tokens = config.batch * config.sequence / record["step_s"]
    return "\n".join([
        f"memory of each of {config.processes} processes, at most: {record['memory_gb']:.3f} GiB, of which",
        sizes, f"a step: {1000 * record['step_s']:,.1f} ms, {tokens:,.0f} tokens/s",
        f"the whole run: about {hours} for {config.steps:,} steps with their quick validations",
        f"a checkpoint: {record['checkpoint_bytes'] / GB:.3f} GiB; {config.keep} and the best are kept"])
