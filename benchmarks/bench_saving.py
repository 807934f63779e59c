"""A gigabyte of model and optimizer saved beside the training: the stall, the steps meanwhile, and loading it again."""

from __future__ import annotations

import ctypes
import resource
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from benchmarks import harness
from fasttrain.checkpoint import Checkpointer
from fasttrain.optim import AdamW

WIDTH, LAYERS, ROUNDS = 1024, 80, 7  # 84 million parameters, 1.0 GB with their states, in 640 tensors


def build(width: int, layers: int) -> tuple[nn.Module, AdamW]:
    """A model after one step."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    optimizer = AdamW(model.parameters(), lr=1e-4)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return model, optimizer


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def stalls(model: nn.Module, optimizer: AdamW, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds that a save keeps the training waiting; each round in turn with one memcpy and DCP's `async_save`."""
    state = {"model": model, "optimizer": optimizer}
    seconds: dict[str, list[float]] = {name: [] for name in ("memcpy", "fasttrain", "DCP async_save")}
    before = resident()
    with Checkpointer(folder / "ours", keep=1) as checkpoints:
        first = checkpoints.save(1, state)
        size, added = first.nbytes, resident() - before
        source, target = (torch.ones(size, dtype=torch.uint8) for _ in range(2))
        first.wait()
        for step in range(2, rounds + 2):
            begun = time.perf_counter()
            ctypes.memmove(target.data_ptr(), source.data_ptr(), size)
            seconds["memcpy"].append(time.perf_counter() - begun)
            saving = checkpoints.save(step, state)
            seconds["fasttrain"].append(saving.stall_s)
            saving.wait()
            begun = time.perf_counter()
            tree = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
            done: Any = dcp.async_save(tree, checkpoint_id=folder / "dcp", no_dist=True)
            seconds["DCP async_save"].append(time.perf_counter() - begun)
            done.result()
            shutil.rmtree(folder / "dcp")
    return {"work": "stall", "bytes": size, "first": first.stall_s, "memory_added": added,
            "seconds": harness.medians(seconds),
            "ratio": {name: harness.ratio(seconds, name, "memcpy") for name in ("fasttrain", "DCP async_save")}}


def slowdown(model: nn.Module, optimizer: AdamW, folder: Path, rounds: int, nice: int) -> dict[str, Any]:
    """Seconds of a training step alone, and while a save is being written, in turn."""
    x = torch.randn(128, model[0].in_features)  # type: ignore[index,operator]

    def step() -> float:
        begun = time.perf_counter()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begun

    seconds: dict[str, list[float]] = {"alone": [], "while saving": []}
    writing = []
    with Checkpointer(folder / "slow", keep=1, nice=nice) as checkpoints:
        checkpoints.save(1, {"model": model, "optimizer": optimizer}).wait()
        for number in range(2, rounds + 2):
            seconds["alone"].append(statistics.mean(step() for _ in range(6)))
            saving = checkpoints.save(number, {"model": model, "optimizer": optimizer})
            begun = time.perf_counter()
            some = []
            while not saving.done:
                some.append(step())
            writing.append(time.perf_counter() - begun)
            seconds["while saving"].append(statistics.mean(some[:-1] or some))  # the last one outlasts it
    return {"work": f"steps, nice {nice}", "bytes": 0, "writing": statistics.median(writing),
            "seconds": harness.medians(seconds), "ratio": {"while saving": harness.ratio(
                seconds, "while saving", "alone")}}


def loads(model: nn.Module, optimizer: AdamW, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of a load from the page cache into a model and an optimizer that have a state."""
    state = {"model": model, "optimizer": optimizer}
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "all.pt")

    def torchs() -> None:
        found = torch.load(folder / "all.pt", weights_only=True)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])

    with Checkpointer(folder / "load", keep=1) as checkpoints:
        size = checkpoints.save(1, state)
        size.wait()
        rivals: dict[str, Callable[[], Any]] = {
            "verified": lambda: checkpoints.load(state), "unverified": lambda: checkpoints.load(state, verify=False),
            "torch.load": torchs}
        seconds = harness.interleave(rivals, rounds)
    return {"work": "load", "bytes": size.nbytes, "seconds": harness.medians(seconds), "ratio": {
        name: harness.ratio(seconds, "verified", name) for name in ("unverified", "torch.load")}}


def run(width: int = WIDTH, layers: int = LAYERS, rounds: int = ROUNDS,
        where: Path | None = None) -> list[dict[str, Any]]:
    """All of it, in a folder of `where`."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    model, optimizer = build(width, layers)
    with tempfile.TemporaryDirectory(dir=where or Path.cwd()) as name:  # /tmp may be memory
        folder = Path(name)
        return [stalls(model, optimizer, folder, rounds), *(
            slowdown(model, optimizer, folder, max(3, rounds // 2), nice) for nice in (0, 19)),
            loads(model, optimizer, folder, rounds)]


def report(figures: list[dict[str, Any]]) -> str:
    """The table of the figures."""
    lines = []
    for row in figures:
        for name, seconds in row["seconds"].items():
            ratio = row["ratio"].get(name)
            told = f"  {ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else ""
            lines.append(f"{row['work']:14} {name:16} {seconds * 1e3:8.1f} ms{told}")
        if "first" in row:
            lines.append(f"{'':14} the first save {row['first'] * 1e3:10.1f} ms, {row['memory_added'] / 1e6:,.0f} MB "
                         f"of memory kept for {row['bytes'] / 1e6:,.0f} MB of state")
        if "writing" in row:
            lines.append(f"{'':14} writing took     {row['writing'] * 1e3:8.0f} ms")
    return "\n".join(lines)
