"""Two processes, one core each, gloo: a whole step of data parallelism beside torch's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from benchmarks import harness
from benchmarks.processes import slowest, together
from fasttrain.dist.wire import Wire
from fasttrain.optim import AdamW
from fasttrain.parallel import DataParallel

TENSORS, WIDTH, BATCHES, ROUNDS = 150, 408, (16, 96), 15  # 25 million parameters
DDP = {f"DDP {'view' if view else 'copy'} {'none' if none else 'zero'}": (view, none)
       for view in (True, False) for none in (True, False)}


def layers(tensors: int, width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(tensors)))


def bf16_hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """torch's own, by another name: by its own name DistributedDataParallel refuses it on a CPU."""
    return default_hooks.bf16_compress_hook(None, bucket)  # type: ignore[arg-type]


# It looks at the annotations themselves, which are strings in this file.
bf16_hook.__annotations__.update(bucket=dist.GradBucket, **{"return": torch.futures.Future[torch.Tensor]})


def ours(x: torch.Tensor, mesh: Wire, model: nn.Module, **options: Any) -> Callable[[], None]:
    parallel = DataParallel(model, mesh=mesh, **options)
    optimizer = AdamW(parallel.parameters(), lr=1e-5)

    def step() -> None:
        parallel(x).sum().mul(1e-3).backward()
        optimizer.clip_grad_norm_(1.0, norm=parallel.grad_norm())
        optimizer.step()
        optimizer.zero_grad()

    return step


def torchs(x: torch.Tensor, model: nn.Module, view: bool, none: bool, hook: Any = None) -> Callable[[], None]:
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=view)
    if hook is not None:
        parallel.register_comm_hook(None, hook)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        parallel(x).sum().mul(1e-3).backward()
        clip_grad_norm_(parallel.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=none)

    return step


def pieces(x: torch.Tensor, wire: Wire, model: nn.Sequential) -> dict[str, Callable[[], None]]:
    """What a step is made of, alone: forward and backward, one raw all-reduce, one fused AdamW pass."""
    flat = torch.randn(sum(p.numel() for p in model.parameters()))
    own = layers(len(model), x.shape[1])
    optimizer = AdamW(own.parameters(), lr=1e-5)
    for p in own.parameters():
        p.grad = torch.randn_like(p)

    def forward_backward() -> None:
        model(x).sum().mul(1e-3).backward()
        model.zero_grad()

    return {"forward and backward": forward_backward, "raw all-reduce": lambda: wire.all_reduce(flat).wait(),
            "AdamW": lambda: optimizer.step()}


def measure(wire: Wire, tensors: int, width: int, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each rival on this rank."""
    x = torch.randn(batch, width)
    rivals = {"fasttrain": ours(x, wire, layers(tensors, width)),
              "fasttrain ordered": ours(x, wire, layers(tensors, width), wire="ordered"),
              "fasttrain bf16": ours(x, wire, layers(tensors, width), wire="bf16"),
              "fasttrain int8": ours(x, wire, layers(tensors, width), wire="int8")}
    rivals |= {name: torchs(x, layers(tensors, width), view, none) for name, (view, none) in DDP.items()}
    rivals["DDP bf16"] = torchs(x, layers(tensors, width), True, True, bf16_hook)
    rivals |= pieces(x, wire, layers(tensors, width))
    return harness.interleave(rivals, rounds, before=lambda _: wire.barrier())


def tax(wire: Wire, tensors: int, width: int, batch: int, rounds: int) -> dict[str, list[float]]:
    """At world size 1: the wrapper beside the bare module."""
    x = torch.randn(batch, width)

    def loop(model: nn.Module) -> Callable[[], None]:
        def step() -> None:
            model(x).sum().mul(1e-3).backward()
            model.zero_grad()
        return step

    rivals = {"bare": loop(layers(tensors, width)), "fasttrain": loop(DataParallel(layers(tensors, width), mesh=wire)),
              "DDP": loop(DistributedDataParallel(layers(tensors, width), gradient_as_bucket_view=True))}
    return harness.interleave(rivals, rounds)


def run(tensors: int = TENSORS, width: int = WIDTH, batches: tuple[int, ...] = BATCHES,
        rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """The step on two processes for each size of batch, and the tax on one."""
    figures = [step(tensors, width, batch, rounds) for batch in batches]
    alone = together(tax, 1, tensors, width, batches[-1], rounds)[0]
    return [*figures, {"work": "wrapper at world size 1", "seconds": harness.medians(alone), "ratio": {
        name: harness.ratio(alone, name, "bare") for name in ("fasttrain", "DDP")}}]


def step(tensors: int, width: int, batch: int, rounds: int) -> dict[str, Any]:
    """The step, and what is left of it beside its pieces in units of a fused AdamW pass."""
    seconds = slowest(together(measure, 2, tensors, width, batch, rounds))
    medians = harness.medians(seconds)
    best = min(DDP, key=medians.__getitem__)
    left = (medians["fasttrain"] - medians["forward and backward"] - medians["raw all-reduce"]) / medians["AdamW"]
    peers = {"fasttrain": best, "fasttrain ordered": best, "fasttrain bf16": "DDP bf16", "fasttrain int8": "DDP bf16"}
    return {"work": "step", "tensors": tensors, "elements": width * width, "batch": batch, "seconds": medians,
            "best": best, "passes": left,
            "ratio": {name: harness.ratio(seconds, peer, name) for name, peer in peers.items()}}


def report(figures: list[dict[str, Any]]) -> str:
    """The table of the figures."""
    *steps, alone = figures
    lines = []
    for row in steps:
        lines.append(f"batch {row['batch']}: " + ", ".join(
            f"{name} {seconds * 1e3:.1f} ms" for name, seconds in row["seconds"].items()))
        lines += [f"  {name} is {ratio['median']:.3f} times ({ratio['low']:.3f} to {ratio['high']:.3f}) as fast as "
                  f"{'DDP bf16' if name.endswith(('bf16', 'int8')) else row['best']}"
                  for name, ratio in row["ratio"].items()]
        lines.append(f"  beside forward, backward and a raw all-reduce: {row['passes']:.2f} of a fused AdamW pass")
    lines += [f"at world size 1 {name} takes {ratio['median']:.4f} ({ratio['low']:.4f} to {ratio['high']:.4f}) of the "
              "bare module" for name, ratio in alone["ratio"].items()]
    return "\n".join(lines)
