"""What surrounds a step, taken into its pass: clipping, loss scale, masters, coded states, EMA, zeroing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.bench_step import update_of_streams
from fasttrain import LossScaler
from fasttrain.optim import AdamW

TENSORS, ELEMENTS, ROUNDS = 1000, 1 << 16, 7
RESTING = 0.9  # share of an embedding's rows that have had no gradient for a long time


class Work(NamedTuple):
    """One row of the table.

    Attributes:
        make: called with the number of tensors and of elements of each: functions of ours and of the peer's.
        aim: what the ratio should be at least.
        streams: how many streams of fp32 the ceiling updates in place.
        bytes: that ours must move for each element.
    """

    name: str
    peer: str
    make: Callable[[int, int], tuple[Callable[[], Any], Callable[[], Any]]]
    aim: float
    bytes: float


def parameters(tensors: int, elements: int, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """Parameters with gradients."""
    params = [torch.nn.Parameter(torch.randn(elements).to(dtype)) for _ in range(tensors)]
    for p in params:
        p.grad = torch.randn(elements).to(dtype)
    return params


def clip_and_zero(tensors: int, elements: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    ours, theirs = parameters(tensors, elements), parameters(tensors, elements)
    a, b = AdamW(ours, zero_gradients=True), torch.optim.AdamW(theirs, fused=True)

    def fasttrain() -> None:
        a.clip_grad_norm_(1.0)
        a.step()

    def torch_fused() -> None:
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        b.step()
        b.zero_grad(set_to_none=False)
    return fasttrain, torch_fused


def scaled(tensors: int, elements: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    ours, theirs = parameters(tensors, elements), parameters(tensors, elements)
    a, b = AdamW(ours), torch.optim.AdamW(theirs, fused=True)
    own, scaler = LossScaler(1.0, dynamic=False), torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.zeros(()))

    def torch_fused() -> None:
        scaler.unscale_(b)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        scaler.step(b)
        scaler.update(1.0)
    return lambda: own.step(a, max_norm=1.0), torch_fused


def split_master(tensors: int, elements: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    ours, theirs = parameters(tensors, elements, torch.bfloat16), parameters(tensors, elements, torch.bfloat16)
    a = AdamW(ours, master="split")
    masters = [torch.nn.Parameter(p.detach().float()) for p in theirs]
    b = torch.optim.AdamW(masters, fused=True)

    def torch_fused() -> None:
        for master, p in zip(masters, theirs, strict=True):
            master.grad = p.grad.float()  # torch's fused step wants gradients of its parameter's dtype
        b.step()
        with torch.no_grad():
            torch._foreach_copy_(theirs, masters)
    return a.step, torch_fused


def coded(tensors: int, elements: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    a = AdamW(parameters(tensors, elements, torch.bfloat16), storage="8-byte")
    return a.step, torch.optim.AdamW(parameters(tensors, elements), fused=True).step


def coded_nearest(tensors: int, elements: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    a = AdamW(parameters(tensors, elements, torch.bfloat16), storage="8-byte", betas=(0.9, 0.99))
    return a.step, torch.optim.AdamW(parameters(tensors, elements), fused=True, betas=(0.9, 0.99)).step


def with_ema(tensors: int, elements: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    ours, theirs = parameters(tensors, elements), parameters(tensors, elements)
    a, b = AdamW(ours, ema_decay=0.999), torch.optim.AdamW(theirs, fused=True)
    averages = [p.detach().clone() for p in theirs]

    def torch_fused() -> None:
        b.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, theirs, 0.001)
    return a.step, torch_fused


def resting_rows(optimizer: torch.optim.Optimizer, p: Tensor) -> None:
    """Bring an embedding to where most of its rows have had no gradient for 2,000 steps."""
    p.grad = torch.randn(p.shape)
    optimizer.step()
    p.grad[: int(RESTING * len(p))] = 0.0
    # What 2,000 steps of decay leave of the moments, by hand: 0.9^2000 is 3e-92 of a first moment.
    rows = slice(0, int(RESTING * len(p)))
    state = optimizer.state[p]
    state["exp_avg"][rows] *= 1e-38
    state["exp_avg_sq"][rows] *= 1e-36
    for _ in range(3):
        optimizer.step()


def embedding(rows: int, width: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Ours on an embedding at rest, and ours where every row has gradients."""
    made = []
    for rest in (True, False):
        p = torch.nn.Parameter(torch.randn(rows, width))
        optimizer = AdamW([p])
        if rest:
            resting_rows(optimizer, p)
        else:
            p.grad = torch.randn(p.shape)
            optimizer.step()
        made.append(optimizer.step)
    return made[0], made[1]


def embedding_of_torch(rows: int, width: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Ours and torch's on an embedding at rest."""
    made = []
    for kind in (AdamW, torch.optim.AdamW):
        p = torch.nn.Parameter(torch.randn(rows, width))
        optimizer = kind([p]) if kind is AdamW else kind([p], fused=True)
        resting_rows(optimizer, p)
        made.append(optimizer.step)
    return made[0], made[1]


WORK = (
    Work("clip + AdamW + zero", "clip_grad_norm_, torch fused, zero_grad", clip_and_zero, 2.0, 36),
    Work("unscale + inf check + clip + AdamW", "GradScaler, clip_grad_norm_, torch fused", scaled, 1.8, 32),
    Work("AdamW, bf16 with exact fp32 master (split)", "fp32 masters, torch fused, copy", split_master, 1.3, 26),
    Work("AdamW, split master, int8 states", "torch fused, fp32", coded, 1.6, 14.06),
    Work("AdamW, split master, int8 states, beta2 0.99", "torch fused, fp32", coded_nearest, 1.6, 14.06),
    Work("AdamW + EMA, fp32", "torch fused, _foreach_lerp_", with_ema, 1.4, 36),
    Work("AdamW, embedding with 90% of its rows at rest", "ours, every row with gradients", embedding, 0.91, 28),
    Work("AdamW, embedding with 90% of its rows at rest", "torch fused, the same", embedding_of_torch, 1.0, 28),
)


def run() -> list[dict[str, Any]]:
    """Measure every row."""
    figures = []
    for work in WORK:
        ours, theirs = work.make(TENSORS, ELEMENTS)
        elements = TENSORS * ELEMENTS
        timed = {"fasttrain": ours, "peer": theirs, "update of four streams": update_of_streams(elements)}
        seconds = harness.interleave(timed, ROUNDS)
        middle = harness.medians(seconds)
        bandwidth = 32 * elements / middle["update of four streams"]  # four streams read and written
        figures.append({"work": work.name, "peer": work.peer, "aim": work.aim, "bytes": work.bytes, "seconds": middle,
                        "of": f"{elements / 1e6:.0f}M elements in {TENSORS:,} tensors",
                        "ratio": harness.ratio(seconds, "peer", "fasttrain"),
                        "of_ceiling": work.bytes * elements / middle["fasttrain"] / bandwidth})
    return figures


def report(figures: list[dict[str, Any]]) -> str:
    """The table of the figures."""
    lines = [f"{'work':47} {'peer':40} {'bytes':>6} {'ours':>10} {'peer':>11} {'ratio':>6} {'(quartiles)':>11} "
             f"{'aim':>5} {'of bandwidth':>12}"]
    for row in figures:
        ours, theirs = row["seconds"]["fasttrain"] * 1e3, row["seconds"]["peer"] * 1e3
        spread = f"{row['ratio']['low']:.2f}-{row['ratio']['high']:.2f}"
        lines.append(f"{row['work']:47} {row['peer']:40} {row['bytes']:6} {ours:7.2f} ms {theirs:8.2f} ms "
                     f"{row['ratio']['median']:5.2f}x {spread:>11} {row['aim']:4}x {row['of_ceiling']:12.0%}")
    return "\n".join(lines)
