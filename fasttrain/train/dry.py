"""``--dry-run``: a few steps, and from them what the whole run would take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fasttrain.dist.mesh import Mesh
from fasttrain.parallel import Zero
from fasttrain.train.config import TrainConfig
from fasttrain.train.usage import GB, weights_table

STEPS = 4  # of which the first, in which memory is allocated, does not count
Record = dict[str, Any]


def dry_run(config: TrainConfig, model: Any, optimizer: Any, steps: Callable[[Callable[[Record], None]], Any],
            look: Callable[[], Record], mesh: Mesh) -> Record:
    """Make the steps, validate once, and say what that took and what the run would. Every process calls it.

    Arguments:
        model: what is called with a batch.
        steps: makes `STEPS` steps, and gives the record of each to what it is called with.
        look: a quick validation.
        mesh: the processes.

    Returns:
        ``{"event": "dry-run", "step", "bytes", "memory_gb", "step_s", "validation_s", "run_s", "checkpoint_bytes"}``:
        bytes of parameters, gradients, buffers and states on the process that has most of them, and the most that any
        has used; the seconds of a step (the median), of a quick validation, and of the whole run, its last validation
        not counted; bytes of a checkpoint of all processes.
    """
    seen: list[Record] = []
    steps(seen.append)
    step_s = median(config.batch * config.sequence / record["tokens_per_s"] for record in seen[1:])
    begun = time.perf_counter()
    look()
    validation_s = time.perf_counter() - begun
    sizes = weights_table(model) | {"states": states_bytes(optimizer)}
    mine = [*sizes.values(), _share(model, optimizer, mesh), seen[-1]["peak_gb"]]
    everyones = torch.stack(mesh.wire().all_gather(torch.tensor(mine, dtype=torch.float64, device=mesh.device)))
    *most, _, _ = max(everyones.tolist(), key=lambda one: sum(one[:-2]))
    return {"event": "dry-run", "step": STEPS, "bytes": dict(zip(sizes, map(int, most), strict=True)),
            "memory_gb": everyones[:, -1].max().item(), "step_s": step_s,
            "validation_s": validation_s, "checkpoint_bytes": round(everyones[:, -2].sum().item()),
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
    states = getattr(optimizer, "inner", optimizer).state.values()
    return sum(_nbytes(value) for state in states for value in state.values())


def _share(model: Any, optimizer: Any, mesh: Mesh) -> float:
    """Bytes of parameters and states that this process saves, where all that have the same do so in equal shares."""
    total, stage = 0.0, mesh.size / mesh.sizes["pipeline"]
    for p in model.parameters():
        cuts = enumerate(getattr(p, "placements", ()))
        part = math.prod(p.device_mesh.size(dim) for dim, one in cuts if not one.is_replicate())
        states = 0 if isinstance(optimizer, Zero) else sum(map(_nbytes, optimizer.state.get(p, {}).values()))
        total += (_nbytes(p) + states) * part / stage
    return total + (states_bytes(optimizer) if isinstance(optimizer, Zero) else 0)  # of a Zero each has its own


def _nbytes(value: Any) -> int:
    if not isinstance(value, Tensor):
        return 0
    return (value.to_local() if hasattr(value, "to_local") else value).nbytes


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
