"""Batches of tokens in random order: ours beside torch's DataLoader over numpy.memmap; and going on at step 10**6."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks import harness
from fasttrain.data import Loader, ShardWriter, TokenDataset

TOKENS, VOCABULARY = 50_000_000, 50_000
SIZES = {"main job": (16, 128), "small GPT": (32, 1024)}  # sequences of a batch, tokens of a sequence
BATCHES = 100  # of one timing
STEP = 10**6
PAIRS = (("fasttrain, no worker", "DataLoader, 0 workers"), ("fasttrain", "DataLoader, 0 workers"),
         ("fasttrain", "DataLoader, 2 workers"), ("fasttrain, 2 processes", "DataLoader, 2 workers"))


class Memmap(Dataset):
    """Windows of a file of tokens, as most loops read them."""

    def __init__(self, path: Path, length: int):
        self.path, self.length = path, length
        self.tokens = np.memmap(path, np.uint16, "r")

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, i: int) -> torch.Tensor:
        begin = i * self.length
        return torch.from_numpy(self.tokens[begin : begin + self.length + 1].astype(np.int32))


def write(folder: Path) -> tuple[Path, Path]:
    """The same random tokens as a token file and as bare numbers."""
    numbers = np.random.default_rng(0)
    ours, bare = folder / "random.tokens", folder / "random.bin"
    with ShardWriter(ours, VOCABULARY, bytes(16)) as shard, open(bare, "wb") as file:
        for _ in range(50):
            some = numbers.integers(0, VOCABULARY, TOKENS // 50)
            shard.add(some)
            file.write(some.astype(np.uint16).tobytes())
    return ours, bare


def endless(loader: DataLoader) -> Any:
    while True:
        yield from loader


def several(batches: Any, key: str | None) -> Callable[[], None]:
    """A function that takes so many batches, and looks at each."""
    def take() -> None:
        for _ in range(BATCHES):
            batch = next(batches)
            int((batch[key] if key else batch)[0, 0])
    return take


def rivals(ours: Path, bare: Path, batch: int, length: int) -> tuple[dict[str, Callable[[], None]], list[Loader]]:
    """By name, a function that takes batches; and the loaders to close."""
    source = TokenDataset(ours).windows(length)
    loaders = {"fasttrain, no worker": Loader(source, batch, workers=0),
               "fasttrain": Loader(source, batch),
               "fasttrain, 2 processes": Loader(source, batch, workers=2, processes=True)}
    found = {name: several(loader, "tokens") for name, loader in loaders.items()}
    for workers in (0, 2):
        theirs = DataLoader(Memmap(bare, length), batch, shuffle=True, drop_last=True, num_workers=workers)
        found[f"DataLoader, {workers} workers"] = several(endless(theirs), None)
    return found, list(loaders.values())


def resumed(path: Path, batch: int, length: int, rounds: int, **way: Any) -> list[float]:
    """Seconds from nothing to the first batch at step `STEP`: files opened, workers started."""
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        with Loader(TokenDataset(path).windows(length), batch, **way) as loader:
            state = loader.state_dict()
            loader.load_state_dict({**state, "index": STEP * batch})
            next(loader)
            times.append(time.perf_counter() - begun)
    return times


def run(rounds: int = 9) -> list[dict[str, Any]]:
    """Tokens a second of each, and the times of going on."""
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        ours, bare = write(Path(folder))
        for name, (batch, length) in SIZES.items():
            functions, loaders = rivals(ours, bare, batch, length)
            seconds = harness.interleave(functions, rounds)
            for loader in loaders:
                loader.close()
            tokens = BATCHES * batch * length
            figures.append({
                "work": f"{name}: batches of {batch} x {length}", "batch": batch, "length": length,
                "tokens_per_s": {rival: tokens / median for rival, median in harness.medians(seconds).items()},
                "ms_per_batch": {rival: median / BATCHES * 1e3 for rival, median in harness.medians(seconds).items()},
                "ratio": {f"{mine} over {peer}": harness.ratio(seconds, peer, mine) for mine, peer in PAIRS},
            })
        batch, length = SIZES["small GPT"]
        for said, way in (("no worker", dict(workers=0)), ("a thread", dict(workers=1)),
                          ("2 processes", dict(workers=2, processes=True))):
            times = resumed(ours, batch, length, rounds, **way)
            figures.append({"work": f"first batch at step {STEP:,}, {said}", "ms": statistics.median(times) * 1e3,
                            "slowest_ms": max(times) * 1e3})
    return figures


def report(figures: list[dict[str, Any]]) -> str:
    """The table of the figures."""
    lines = []
    for row in figures:
        if "ms" in row:
            lines.append(f"{row['work']:44} {row['ms']:9.2f} ms, slowest {row['slowest_ms']:.2f} ms")
            continue
        lines.append(row["work"])
        lines += [f"    {rival:40} {speed / 1e6:9.1f} million tokens/s {row['ms_per_batch'][rival]:8.3f} ms/batch"
                  for rival, speed in row["tokens_per_s"].items()]
        lines += [f"    {pair:46} {ratio['median']:6.2f}x" for pair, ratio in row["ratio"].items()]
    return "\n".join(lines)
