"""Cross-entropy of a vocabulary divided over two processes, and a linear layer with it in chunks, beside torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness, processes
from benchmarks.allocated import peak
from fasttrain.losses import cross_entropy, linear_cross_entropy

ROWS, FEATURES, RANKS, ROUNDS = 1024, 256, 2, 5
CLASSES, DTYPES = (50257, 151936), {"fp32": torch.float32, "bf16": torch.bfloat16}


def of_logits(mesh: Any, rows: int, classes: int, dtype: torch.dtype, wire: Any) -> dict[str, Callable[[], Any]]:
    """Forward and backward of logits that a column-parallel head has made; `in place` takes a copy of them, as
    `a copy` does alone."""
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    torch.manual_seed(0)
    x = distribute_tensor(torch.randn(rows, classes).to(dtype), mesh, [Shard(1)]).requires_grad_()
    targets = torch.randint(0, classes, (rows,))

    def ours() -> None:
        torch.autograd.grad(cross_entropy(x, targets, wire=wire), x)

    def in_place() -> None:
        torch.autograd.grad(cross_entropy(x.clone(), targets, inplace_backward=True, wire=wire), x)

    def theirs() -> None:
        with loss_parallel():
            torch.autograd.grad(F.cross_entropy(x.float(), targets), x)

    return {"fasttrain": ours, "in place": in_place, "a copy": lambda: x.clone(), "loss_parallel": theirs}


def of_layer(mesh: Any, rows: int, classes: int, dtype: torch.dtype, wire: Any) -> dict[str, Callable[[], Any]]:
    """A linear layer whose classes are divided, and its loss."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    torch.manual_seed(0)
    hidden = torch.randn(rows, FEATURES).to(dtype).requires_grad_()
    weight = distribute_tensor((torch.randn(classes, FEATURES) / 16).to(dtype), mesh, [Shard(0)]).requires_grad_()
    targets = torch.randint(0, classes, (rows,))

    def ours() -> None:
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, wire=wire), (hidden, weight))

    def theirs() -> None:
        whole: Any = DTensor.from_local(hidden, mesh, [Replicate()], run_check=False)
        with loss_parallel():
            torch.autograd.grad(F.cross_entropy((whole @ weight.t()).float(), targets), (hidden, weight))

    return {"fasttrain": ours, "loss_parallel": theirs}


def measure(wire: Any, make: Any, rows: int, classes: int, dtype: str, rounds: int) -> dict[str, Any]:
    """Of this process: seconds of each round, and the highest memory beside what was there."""
    from torch.distributed.device_mesh import init_device_mesh

    rivals = make(init_device_mesh("cpu", (wire.size,)), rows, classes, DTYPES[dtype], wire)
    for call in rivals.values():
        call()
    memory = {name: peak(call) for name, call in rivals.items()}
    seconds = harness.interleave(rivals, rounds, warm_up=1, before=lambda name: wire.barrier())
    return {"memory": memory, "seconds": seconds}


def whole(rows: int, classes: int, dtype: str) -> int:
    """Memory of torch's cross-entropy of all logits in one process."""
    x: Tensor = torch.randn(rows, classes).to(DTYPES[dtype]).requires_grad_()
    targets = torch.randint(0, classes, (rows,))
    return peak(lambda: torch.autograd.grad(F.cross_entropy(x.float(), targets), x))


def run(rows: int = ROWS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Every size, in both dtypes."""
    found: dict[str, Any] = {"rows": rows, "ranks": RANKS, "logits": [], "layers": []}
    for classes in CLASSES:
        for dtype in DTYPES:
            for kind, make in (("logits", of_logits), ("layers", of_layer)):
                answers = processes.together(measure, RANKS, make, rows, classes, dtype, rounds)
                seconds = processes.slowest([answer["seconds"] for answer in answers])
                memory = {name: max(answer["memory"][name] for answer in answers) for name in seconds}
                found[kind].append({
                    "classes": classes, "dtype": dtype, "memory": memory, "seconds": harness.medians(seconds),
                    "ratio": harness.ratio(seconds, "loss_parallel", "fasttrain"),
                    "memory_of_one_process": whole(rows, classes, dtype)})
    return found


def report(figures: dict[str, Any]) -> str:
    """The tables of the figures."""
    lines = [f"{figures['rows']} rows, {figures['ranks']} processes; time of the slower, the highest memory of one"]
    for kind in ("logits", "layers"):
        title = "logits that are there" if kind == "logits" else f"a linear layer of {FEATURES} features, in chunks"
        lines.append(title)
        for found in figures[kind]:
            rivals = ", ".join(f"{name} {found['seconds'][name] * 1e3:.0f} ms {found['memory'][name] / 1e6:.0f} MB"
                               for name in found["seconds"])
            share = found["memory"]["fasttrain"] / found["memory"]["loss_parallel"]
            lines.append(f"  {found['classes']:>7} {found['dtype']}: {rivals}; {found['ratio']['median']:.2f}x, "
                         f"{share:.0%} of its memory (torch, whole: {found['memory_of_one_process'] / 1e6:.0f} MB)")
    return "\n".join(lines)
