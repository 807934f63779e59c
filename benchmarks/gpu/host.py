"""What a step costs the host: parameters of few elements, plain and as DTensors, with the same and with new gradients;
and with gradients in buckets, where the reducer vouches for them.

The device is idle at the start, and what it does is not counted. DTensors are sharded over one process, which is what
the host sees of them on any number.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Parameter

from benchmarks.gpu import peers
from benchmarks.gpu.bench import OURS, Bench, Rival, summary
from benchmarks.gpu.recipes import OPTIONS
from fasttrain.optim import AdamW

ELEMENTS = 64
COUNTS = (150, 10_000)


def plain(bench: Bench) -> Iterator[dict[str, Any]]:
    """Microseconds of a step of plain parameters."""
    return rows(bench, None)


def sharded(bench: Bench) -> Iterator[dict[str, Any]]:
    """Microseconds of a step of DTensors."""
    mesh = one_process(bench.device)
    try:
        yield from rows(bench, mesh)
    finally:
        dist.destroy_process_group()


def rows(bench: Bench, mesh: Any) -> Iterator[dict[str, Any]]:
    """Both counts."""
    for count in (3, 5) if bench.dry else COUNTS:
        for fresh in (False, True):
            yield row(bench, count, fresh, mesh)


def one_process(device: torch.device) -> Any:
    """A mesh of this process alone."""
    nccl = device.type == "cuda" and dist.is_nccl_available()
    dist.init_process_group("nccl" if nccl else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.init_device_mesh(device.type, (1,))


def made(bench: Bench, mesh: Any) -> torch.Tensor:
    """Random numbers, as a shard if there is a mesh."""
    from torch.distributed.tensor import DTensor, Shard

    plain = torch.randn(ELEMENTS, device=bench.device)
    return plain if mesh is None else DTensor.from_local(plain, mesh, [Shard(0)], run_check=False)


def renew(bench: Bench, params: list[Parameter], mesh: Any, turn: int) -> None:
    """Give every parameter a gradient at another address."""
    for p in params:
        p.grad = made(bench, mesh)


def bucketed(bench: Bench) -> Iterator[dict[str, Any]]:
    """Microseconds of a step of parameters whose gradients are views of buckets."""
    one_process(bench.device)
    try:
        for count in (3, 5) if bench.dry else COUNTS:
            yield bucket_row(bench, count)
    finally:
        dist.destroy_process_group()


def bucket_row(bench: Bench, count: int) -> dict[str, Any]:
    """One count of parameters. Every turn has a backward pass, which is not timed."""
    from fasttrain.parallel import Reducer

    theirs, _ = peers.found({name: peers.FP32[name] for name in ("torch fused", "torch foreach")})
    rivals, reducers = {}, []
    for name, make in {OURS: None, **theirs}.items():
        params = [Parameter(made(bench, None)) for _ in range(count)]
        reducer = Reducer(params, wire="ordered", watch=False)  # of one rank, it leaves "same" out
        backward = partial(reduce, bench, params)
        backward(0)
        step = make(params) if make is not None else ours(AdamW(params, **OPTIONS), reducer)
        for turn in range(3):
            step()
            backward(turn)
        rivals[name] = Rival(name, [step], backward)
        reducers.append(reducer)
    seconds = bench.interleave(rivals, ahead=False, budget=5.0, least=2,
                               timed=lambda call, ahead: bench.host_seconds(call))
    for reducer in reducers:
        reducer.remove()
    return summary(f"host time, gradients in buckets: {count:,}", seconds, section="host", unit="us",
                   note="aim 100 us", limit_us=100)


def reduce(bench: Bench, params: list[Parameter], turn: int) -> None:
    """A backward pass that gives every parameter a gradient, which the reducer packs into its bucket."""
    for p in params:
        p.grad = None
    torch.autograd.backward(params, [torch.ones_like(p) for p in params])


def ours(optimizer: AdamW, reducer: Any) -> Any:
    """The step that is vouched for."""
    def step() -> None:
        reducer.vouch(optimizer)
        optimizer.step()
    return step


def row(bench: Bench, count: int, fresh: bool, mesh: Any) -> dict[str, Any]:
    """One count of parameters."""
    names: tuple[str, ...] = ("torch fused", "torch foreach")
    if mesh is not None and count > 1000:  # torch takes seconds for each step: one stands for all
        names = () if fresh else ("torch fused",)
    theirs, _ = peers.found({name: peers.FP32[name] for name in names})
    rivals = {}
    for name, make in {OURS: lambda params: AdamW(params, **OPTIONS).step, **theirs}.items():
        params = [Parameter(made(bench, mesh)) for _ in range(count)]
        renew(bench, params, mesh, 0)
        step = make(params)
        step()
        rivals[name] = Rival(name, [step], partial(renew, bench, params, mesh) if fresh else None)
    seconds = bench.interleave(rivals, ahead=False, budget=5.0, least=2,
                               timed=lambda call, ahead: bench.host_seconds(call))
    kind = "DTensors" if mesh is not None else "parameters"
    limit = 100 + count * (2 if mesh is not None else 1)
    grads = "new gradients" if fresh else "the same gradients"
    return summary(f"host time, {count:,} {kind}, {grads}", seconds, section="host", unit="us",
                   note=f"aim {limit:,} us", limit_us=limit)
