"""GPT-2 124M in bfloat16 at the batch that fills the GPU: tokens per second, MFU, peak memory, the step's share."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu import recipes
from benchmarks.gpu.bench import Bench
from fasttrain import StepGraph
from fasttrain.optim import AdamW

PEAKS = {"H200": 989e12, "GH200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}  # dense bf16, data sheets
SIZE = dict(layers=12, heads=12, width=768, vocabulary=50304, positions=1024)
TINY = dict(layers=1, heads=2, width=16, vocabulary=64, positions=8)
STEPS, FILLED = 8, 0.9
LARGEST = 1 << 31  # logits: beyond, kernels would be others, with offsets of 64 bits


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """The model of Radford et al. (2019), without dropout; its vocabulary padded to a multiple of 128."""

    def __init__(self, layers: int, heads: int, width: int, vocabulary: int, positions: int):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean cross-entropy of each next token."""
        x = self.tokens(tokens[:, :-1]) + self.places.weight[: tokens.shape[1] - 1]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


class Run(NamedTuple):
    """How a model is kept, and what steps it after each backward."""

    dtype: torch.dtype
    make: Callable[[list[nn.Parameter]], Callable[[], Any]]


def torch_recipe(params: list[nn.Parameter]) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW(params, **recipes.OPTIONS, fused=True)

    def step() -> None:
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    return step


RUNS = {
    "torch, fp32 weights under autocast": Run(torch.float32, torch_recipe),
    "torch, bf16 weights and fp32 masters": Run(torch.bfloat16, recipes.with_masters),
    "fasttrain, split": Run(torch.bfloat16, lambda p: recipes.clipped(
        AdamW(p, **recipes.OPTIONS, master="split"))),
    "fasttrain, split and int8 states": Run(torch.bfloat16, lambda p: recipes.clipped(
        AdamW(p, **recipes.OPTIONS, storage="8-byte"))),
}
FIRST, OURS = "torch, fp32 weights under autocast", "fasttrain, split"
GRAPHED = "fasttrain, split, whole step in one CUDA graph"


class Training:
    """A model with one of the recipes, and the batch that it is trained on."""

    def __init__(self, bench: Bench, how: Run, size: dict[str, int], batch: int):
        self.bench, self.how = bench, how
        self.model = GPT2(**size).to(bench.device, how.dtype)
        self.tokens = torch.randint(0, size["vocabulary"], (batch, size["positions"] + 1), device=bench.device)
        self.params = list(self.model.parameters())
        self.stepped: Callable[[], Any] | None = None

    def gradients(self) -> None:
        """Forward and backward."""
        mixed = self.how.dtype == torch.float32
        with torch.autocast(self.bench.device.type, torch.bfloat16, enabled=mixed):
            loss = self.model(self.tokens)
        loss.backward()

    def update(self) -> None:
        """The rest of a step."""
        if self.stepped is None:
            self.stepped = self.how.make(self.params)
        self.stepped()
        for p in self.params:
            p.grad = None


def forget(bench: Bench) -> None:
    """Give back the memory of the last model, and begin to watch the peak again."""
    gc.collect()  # optimizers are in cycles
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)


def peak(bench: Bench, how: Run, size: dict[str, int], batch: int) -> int:
    """Bytes that two steps need at most."""
    forget(bench)
    training = Training(bench, how, size, batch)
    for _ in range(2):
        training.gradients()
        training.update()
    return torch.cuda.max_memory_allocated(bench.device)


def filling(bench: Bench, size: dict[str, int]) -> int:
    """The batch, a multiple of 8, with which the recipe that needs most memory fills the GPU.

    It is 40 where memory is plenty: 41 thousand tokens, which keep every multiprocessor busy.
    """
    small, large = 4, 12
    less, more = (peak(bench, RUNS[FIRST], size, batch) for batch in (small, large))
    each = (more - less) / (large - small)
    room = FILLED * torch.cuda.get_device_properties(bench.device).total_memory - (less - small * each)
    largest = LARGEST // (size["positions"] * size["vocabulary"])
    return max(8, min(int(room / each), largest) // 8 * 8)


def measured(bench: Bench, how: Run, size: dict[str, int], batch: int) -> dict[str, float]:
    """Medians over some steps of the seconds of forward and backward, and of all; and the peak of memory."""
    cuda = bench.device.type == "cuda"
    forget(bench)
    training = Training(bench, how, size, batch)
    inner, whole = [], []
    for turn in range(3 if bench.dry else STEPS + 3):
        if cuda:
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            marks[0].record()
            training.gradients()
            marks[1].record()
            training.update()
            marks[2].record()
            marks[2].synchronize()
            times = marks[0].elapsed_time(marks[1]) / 1e3, marks[0].elapsed_time(marks[2]) / 1e3
        else:
            first = bench.host_seconds(training.gradients)
            times = first, first + bench.host_seconds(training.update)
        if turn >= 2:
            inner.append(times[0])
            whole.append(times[1])
    return {"gradients": statistics.median(inner), "step": statistics.median(whole), "steps": len(whole),
            "parameters": sum(p.numel() for p in training.params),
            "peak": float(torch.cuda.max_memory_allocated(bench.device)) if cuda else 0.0}


def graphed(bench: Bench, size: dict[str, int], batch: int) -> dict[str, float]:
    """The same with the whole step in one CUDA graph, of our recipe; forward and backward are not told apart."""
    forget(bench)
    training = Training(bench, RUNS[OURS], size, batch)
    optimizer = AdamW(training.params, **recipes.OPTIONS, master="split")
    update = recipes.clipped(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        training.gradients()
        update()

    graph = StepGraph(step, optimizer)
    graph.capture()
    whole = []
    for _ in range(STEPS + 1):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        graph.replay()
        marks[1].record()
        marks[1].synchronize()
        whole.append(marks[0].elapsed_time(marks[1]) / 1e3)
    peak = float(torch.cuda.max_memory_allocated(bench.device))
    graph.close()
    return {"step": statistics.median(whole[1:]), "steps": STEPS, "peak": peak,
            "parameters": sum(p.numel() for p in training.params)}


def run(bench: Bench) -> list[dict[str, Any]]:
    """Every recipe on the same batch, one after the other, and ours again at the end for the spread."""
    size = TINY if bench.dry else SIZE
    batch = 2 if bench.dry else filling(bench, size)
    tokens = batch * size["positions"]
    found = {name: measured(bench, how, size, batch) for name, how in RUNS.items()}
    if bench.device.type == "cuda":
        found[GRAPHED] = graphed(bench, size, batch)
    again = measured(bench, RUNS[OURS], size, batch)
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else ""
    top = next((value for part, value in PEAKS.items() if part in name), None)
    rows = []
    for how, one in found.items():
        # 6 for each parameter and 12 layers x width x positions for attention: Chowdhery et al., arXiv 2204.02311, B
        flops = tokens * (6 * one["parameters"] + 12 * size["layers"] * size["width"] * size["positions"])
        rate, outside = tokens / one["step"], 1 - one["gradients"] / one["step"] if "gradients" in one else None
        said = [f"batch {batch} x {size['positions']}"]
        said += [f"{outside:.1%} outside of forward and backward"] if outside is not None else []
        said += [f"MFU {flops / one['step'] / top:.1%}"] if top else []
        said += [f"peak {one['peak'] / 2**30:.1f} GiB"] if one["peak"] else []
        row = {"work": f"GPT-2 124M, end to end: {how}", "section": "end to end", "unit": "tokens/s",
               "value": {"fasttrain" if how.startswith("fasttrain") else how: rate}, "rounds": one["steps"],
               "note": ", ".join(said), "outside": outside, "peak_bytes": one["peak"],
               "mfu": flops / one["step"] / top if top else None, "batch": batch}
        if how.startswith("fasttrain"):
            ratios = {other: found[other]["step"] / one["step"] for other in found if other.startswith("torch")}
            row["ratio"] = {other: {"median": ratio} for other, ratio in ratios.items()}
        if how == OURS:
            row["spread"] = abs(again["step"] / one["step"] - 1)
        rows.append(row)
    if GRAPHED not in found:
        rows[-1]["absent"] = {GRAPHED: f"a CUDA graph needs a GPU; this is {bench.device}"}
    return rows
