"""DTensor parameters: on any placement the step of the whole, element for element.

Every rank makes the whole model and runs it itself; what it holds of the sharded run is compared with its part of that.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import ranks
import torch
from shards import LAYOUTS, compare, gradients, placed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fasttrain.optim
from fasttrain.optim.local import local

SIZES = ((90, 64), (16, 8, 3), (7, 5), (3, 6), (1, 2))  # even, deep, uneven, empty on a rank, empty on three
ADAM = {"lr": 1e-2}
STOCHASTIC = ("AdamW", torch.bfloat16,
              dict(ADAM, master="stochastic", state_dtype="bf16", state_rounding="stochastic"))
RUNS: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("AdamW", torch.float32, ADAM),
    ("AdamW", torch.float64, dict(ADAM, amsgrad=True)),
    ("SGD", torch.float32, dict(lr=0.1, momentum=0.9, weight_decay=0.1)),
    ("SGD", torch.float32, dict(lr=0.1)),
    ("Lion", torch.bfloat16, dict(lr=1e-3)),
    ("NAdam", torch.float32, ADAM),
    ("ASGD", torch.float32, ADAM),
    ("Adagrad", torch.float32, ADAM),
    ("Rprop", torch.float32, ADAM),
    ("Adan", torch.float32, ADAM),
    ("ScheduleFreeAdamW", torch.float32, ADAM),
    ("AdamW", torch.bfloat16, dict(ADAM, master="split", state_dtype="bf16", ema_decay=0.9)),
    ("AdamW", torch.bfloat16, dict(ADAM, master="fp32", ema_decay=0.9, ema_dtype="bf16")),
    ("AdamW", torch.bfloat16, dict(ADAM, master="kahan")),
    ("AdamW", torch.float16, dict(ADAM, master="kahan", clip_value=0.5)),
    ("Lion", torch.bfloat16, dict(lr=1e-3, master="split8", state_dtype="bf16", zero_gradients=True)),
    STOCHASTIC,
]


def stepped(wire: Any, names: list[str], runs: list[Any], sizes: Any, backend: str | None) -> None:
    for name, (optimizer, dtype, options) in itertools.product(names, runs):
        mesh_shape, placements = LAYOUTS[name]
        what = f"{name}, {optimizer}, {dtype}, {options}"
        mesh = init_device_mesh("cpu", mesh_shape)
        shapes = [size for size in sizes if ("strided" not in name and "fully" not in name) or size[0] % 4 == 0]
        values = gradients(shapes, 0, dtype)
        wholes = [nn.Parameter(value.clone()) for value in values]
        params = [nn.Parameter(placed(value, mesh, placements)) for value in values]
        kind = getattr(fasttrain.optim, optimizer)
        ours, theirs = kind(params, backend=backend, **options), kind(wholes, backend=backend, **options)
        for step in range(4):
            for i, (p, q, grad) in enumerate(zip(params, wholes, gradients(shapes, 1 + step, dtype), strict=True)):
                missing = (i + step) % 4 == 2
                q.grad = None if missing else grad
                p.grad = None if missing else placed(grad, mesh, placements)
            ours._clip = theirs._clip = 0.37 if step == 2 else 1.0
            if step == 3:  # written outside: what is kept beside is made anew
                for p in (*params, *wholes):
                    with torch.no_grad():
                        p.mul_(0.5)
            ours.step()
            theirs.step()
            if options.get("zero_gradients"):
                assert all(local(p.grad).eq(0).all() for p in params if p.grad is not None)
            compare(ours, theirs, params, wholes, f"{what}, step {step}")


@pytest.mark.parametrize("name", LAYOUTS)
def test_shards_are_stepped_as_the_whole(name: str) -> None:
    turn = list(LAYOUTS).index(name)
    ranks.run(stepped, 4, [name], RUNS if name == "rows" else [*RUNS[turn % 3::3], STOCHASTIC], SIZES, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_run_on_every_layout(name: str) -> None:
    ranks.run(stepped, 4, [name], RUNS, SIZES, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_gathers_its_updates(dtype: torch.dtype) -> None:
    """The same bits: every rank orthogonalises the batches of the unsharded run."""
    sizes = ((16, 12), (7, 12), (16, 12), (4, 6, 5), (4,), (1, 2))
    ranks.run(stepped, 4, ["rows", "fully_shard over columns", "copies"], [("Muon", dtype, dict(lr=0.1))], sizes, None)
    ranks.run(stepped, 4, ["blocks", "columns"], [("Muon", dtype, dict(lr=0.1, nesterov=False))], sizes[:4], None)


def test_on_the_reference_backend() -> None:
    ranks.run(stepped, 4, ["blocks"], [RUNS[0], RUNS[-6], STOCHASTIC], SIZES[2:4], "reference")
