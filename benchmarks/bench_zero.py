"""Two processes, one core each, gloo: a step of ZeRO beside ZeroRedundancyOptimizer over DDP, and fully_shard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from benchmarks import harness
from benchmarks.bench_parallel import layers
from benchmarks.processes import slowest, together
from fasttrain.dist.wire import Wire
from fasttrain.optim import AdamW
from fasttrain.parallel import DataParallel, Zero

TENSORS, WIDTH, BATCHES, ROUNDS, BLOCK = 150, 408, (16, 96), 15, 10  # 25 million parameters; of fully_shard: in blocks
PEERS = ("ZeroRedundancyOptimizer copy", "ZeroRedundancyOptimizer view")


class Rival:
    """A loop's iteration, and what it keeps between its parts.

    Arguments:
        model: what backward runs through.
        step: what follows it, zeroing included.
        states: the optimizer's, of this rank.
    """

    def __init__(self, model: nn.Module, x: torch.Tensor, step: Callable[[], None], states: Any,
                 gradients: Callable[[], int]):
        self.model, self.x, self.step, self.states, self.gradients = model, x, step, states, gradients
        self.bytes: dict[str, int] = {}

    def __call__(self) -> None:
        self.model(self.x).sum().mul(1e-3).backward()
        if not self.bytes:
            self.bytes["gradients after backward"] = self.gradients()
        self.step()
        self.bytes["states"] = sum(held(value).nbytes for state in self.states().values() for value in state.values())


def held(tensor: Any) -> Any:
    """What this process holds of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def ours(x: torch.Tensor, mesh: Wire, model: nn.Module, **options: Any) -> Rival:
    parallel = DataParallel(model, mesh=mesh)
    optimizer = Zero(parallel, AdamW, lr=1e-5, **options)

    def step() -> None:
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    def gradients() -> int:
        buckets = {bucket.data.untyped_storage().data_ptr(): bucket.data.untyped_storage().nbytes()
                   for bucket in parallel.reducer.buckets}
        own = sum(own.nbytes for own in optimizer.method.own) if optimizer.stage == 2 else 0
        return sum(buckets.values()) + own

    return Rival(parallel, x, step, lambda: optimizer.inner.state, gradients)


def redundancy(x: torch.Tensor, model: nn.Module, view: bool) -> Rival:
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(parallel.parameters(), torch.optim.AdamW, parameters_as_bucket_view=view,
                                        lr=1e-5, fused=True)

    def step() -> None:
        clip_grad_norm_(parallel.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Rival(parallel, x, step, lambda: optimizer.optim.state,
                 lambda: sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))


def sharded(x: torch.Tensor, model: nn.Module, cls: Any, **options: Any) -> Rival:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    blocks = [nn.Sequential(*list(model)[at : at + BLOCK]) for at in range(0, len(list(model)), BLOCK)]
    whole = nn.Sequential(*(fully_shard(block, mesh=mesh) for block in blocks))
    fully_shard(whole, mesh=mesh)
    optimizer = cls(whole.parameters(), lr=1e-5, **options)

    def step() -> None:
        if cls is AdamW:
            optimizer.clip_grad_norm_(1.0)
        else:
            clip_grad_norm_(whole.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Rival(whole, x, step, lambda: optimizer.state,
                 lambda: sum(held(p.grad).nbytes for p in whole.parameters() if p.grad is not None))


def measure(wire: Wire, tensors: int, width: int, batch: int, rounds: int) -> tuple[Any, Any]:
    """Seconds of each rival on this rank, and the bytes that it keeps."""
    x = torch.randn(batch, width)

    def model() -> nn.Sequential:
        return layers(tensors, width)

    rivals = {"ZeRO-1": ours(x, wire, model()), "ZeRO-1 overlap": ours(x, wire, model(), overlap=True),
              "ZeRO-2": ours(x, wire, model(), stage=2),
              PEERS[0]: redundancy(x, model(), False), PEERS[1]: redundancy(x, model(), True),
              "fully_shard, torch AdamW": sharded(x, model(), torch.optim.AdamW, fused=True),
              "fully_shard, fasttrain AdamW": sharded(x, model(), AdamW)}
    seconds = harness.interleave(rivals, rounds, before=lambda _: wire.barrier())
    return seconds, {name: rival.bytes for name, rival in rivals.items()}


def run(tensors: int = TENSORS, width: int = WIDTH, batches: tuple[int, ...] = BATCHES,
        rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """The step on two processes, for each size of batch."""
    return [row for batch in batches for row in step(tensors, width, batch, rounds)]


def step(tensors: int, width: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """The step, with the bytes of the rank that keeps most."""
    answers = together(measure, 2, tensors, width, batch, rounds)
    seconds = slowest([times for times, _ in answers])
    medians = harness.medians(seconds)
    best = min(PEERS, key=medians.__getitem__)
    return [{"work": name, "tensors": tensors, "elements": width * width, "batch": batch, "seconds": medians[name],
             "bytes": {what: max(kept[name][what] for _, kept in answers) for what in answers[0][1][name]},
             "peer": best, "ratio": harness.ratio(seconds, best, name)} for name in seconds]


def report(figures: list[dict[str, Any]]) -> str:
    """The table of the figures."""
    lines = []
    for row in figures:
        kept = ", ".join(f"{what} {size / 1e6:.1f} MB" for what, size in row["bytes"].items())
        name, ratio = f"batch {row['batch']}, {row['work']}", row["ratio"]
        lines.append(f"{name:40} {row['seconds'] * 1e3:8.1f} ms  {ratio['median']:.3f}x ({ratio['low']:.3f} to "
                     f"{ratio['high']:.3f}) of {row['peer']}; {kept}")
    return "\n".join(lines)
