"""What a step on a GPU costs the host, without the GPU: tensors in CPU memory in the place of the device's, launches
and copies to the device stubbed (`benchmarks.stubbed`). The driver's own calls come on top of it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from benchmarks import harness, stubbed
from fasttrain.optim import AdamW
from fasttrain.parallel import Reducer

COUNTS = (150, 10_000)
ELEMENTS = 64
KINDS = ("plain", "DTensor", "in buckets")


def run(counts: tuple[int, ...] = COUNTS, rounds: int = 8) -> list[dict[str, Any]]:
    """Microseconds of a step of AdamW, driven by the host and by the device, in turn with new and the same gradients.

    In buckets, after a backward pass each time, with `Reducer.vouch`.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        with stubbed.device():
            return [figure(kind, count, driven, mesh, rounds * (4 if count < 1000 else 1))
                    for kind in KINDS for count in counts for driven in (False, True)]
    finally:
        dist.destroy_process_group()


def figure(kind: str, count: int, driven: bool, mesh: Any, rounds: int) -> dict[str, Any]:
    """One kind of parameters."""
    params = [Parameter(tensor(mesh if kind == "DTensor" else None)) for _ in range(count)]
    optimizer = AdamW(params, backend="cuda", capturable=driven)
    reducer = Reducer(params, wire="ordered", watch=False) if kind == "in buckets" else None

    def vouched() -> None:
        if reducer is not None:
            assert reducer.vouch(optimizer)
        optimizer.step()

    before: dict[str, Callable[[], None]] = {"new": partial(renew, params)}
    if reducer is None:
        before["same"] = lambda: None
    else:
        before = {"in buckets": partial(reduce, params)}
    for make_ready in (*before.values(),) * 2:
        make_ready()
        vouched()
    gc.disable()  # new gradients would have it run within a step
    seconds = harness.interleave(dict.fromkeys(before, vouched), rounds, before=lambda name: before[name]())
    gc.enable()
    if reducer is not None:
        reducer.remove()
    return {"kind": kind, "parameters": count, "driven": "device" if driven else "host",
            "us": {name: value * 1e6 for name, value in harness.medians(seconds).items()}}


def tensor(mesh: Any) -> Tensor:
    """Random numbers, as a shard if there is a mesh."""
    from torch.distributed.tensor import DTensor, Shard

    plain = torch.randn(ELEMENTS)
    return plain if mesh is None else DTensor.from_local(plain, mesh, [Shard(0)], run_check=False)


def renew(params: list[Parameter]) -> None:
    """A gradient at another address for every parameter."""
    old = [p.grad for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    del old


def reduce(params: list[Parameter]) -> None:
    """A backward pass, whose gradients the reducer packs into its buckets."""
    for p in params:
        p.grad = None
    torch.autograd.backward(params, [torch.ones_like(p) for p in params])


def report(figures: list[dict[str, Any]]) -> str:
    """The table of the figures."""
    lines = [f"{'parameters':>22}  driven by  microseconds of a step (of that, for each parameter)"]
    for row in figures:
        parts = ", ".join(f"{name} {us:,.0f} ({us / row['parameters']:.2f})" for name, us in row["us"].items())
        lines.append(f"{row['parameters']:>10,} {row['kind']:>11}  {row['driven']:>9}  {parts}")
    return "\n".join(lines)
