"""What tensor parallelism sends in a step is what the formulas say: counted at the collectives that torch issues."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from ranks import run
from test_tensor_plans import PLAN, own
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain.dist.mesh import Mesh
from fasttrain.parallel.tensor import tensor_parallel
from fasttrain.train.blocks import recompute
from fasttrain.train.model import GPT

BATCH, POSITIONS, WIDTH, LAYERS = 3, 8, 12, 2
N = BATCH * POSITIONS * WIDTH  # elements of one activation
# What a rank sends in units of (ranks - 1) / ranks: a sum is scattered and gathered.
KINDS = {"all_reduce": lambda given, got: 2 * given.numel(), "reduce_scatter": lambda given, got: given.numel(),
         "all_gather": lambda given, got: got.numel()}


class Counted(TorchDispatchMode):
    """Counts collectives of torch, and the elements that a rank sends in them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        kind = next((kind for kind in KINDS if name.startswith(f"_c10d_functional.{kind}")), None)
        if kind is not None:
            self.calls[kind] += 1
            self.elements += KINDS[kind](args[0], out)
        return out


def counted(wire: Any, size: int) -> dict[Any, tuple[Counter[str], int]]:
    mesh, found = Mesh(tensor=size), {}
    tokens = torch.randint(40, (BATCH, POSITIONS))
    for kind in ("gpt", "gated", "recomputed", "own"):
        for sequence in (False, True):
            if kind == "own":
                model = tensor_parallel(own(torch.float32, 40), mesh, PLAN, sequence=sequence)
            else:
                model = GPT(LAYERS, WIDTH, 4, POSITIONS, ngrams=3, rows=20, vocabulary=40, gated=kind == "gated")
                if kind == "recomputed":
                    recompute(model)
                tensor_parallel(model, mesh, sequence=sequence)
            with Counted() as sent:
                model(tokens).to_local().square().sum().backward()
            found[kind, sequence] = sent.calls, sent.elements
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_are_those_of_the_formula(size: int) -> None:
    """8 (t - 1) / t of an activation in each block, 2 after the embedding and 2 before the head, divided or not."""
    found = run(counted, size, size)[0]
    half = LAYERS * 2 + 1
    for kind in ("gpt", "gated"):
        for sequence in (False, True):
            calls = Counter(all_gather=2 * half, reduce_scatter=2 * half) if sequence else Counter(all_reduce=2 * half)
            assert found[kind, sequence] == (calls, (LAYERS * 8 + 4) * N), (kind, sequence)
    # Recomputed, but for the last sum of a block, after which nothing is kept: torch's checkpoint stops before it.
    assert found["recomputed", False] == (Counter(all_reduce=2 * half + LAYERS), (LAYERS * 10 + 4) * N)
    assert found["recomputed", True] == (Counter(all_gather=2 * half + 2 * LAYERS, reduce_scatter=2 * half + LAYERS),
                                         (LAYERS * 11 + 4) * N)
    # Queries, keys and values are three modules that read one tensor: it is brought to them once, as in the GPT.
    assert found["own", False] == (Counter(all_reduce=6), 12 * N)
    # Beside these: positions of one sample in the backward pass, and into and out of the module that needs all.
    assert found["own", True] == (Counter(all_gather=6 + 1 + 2, reduce_scatter=6), 12 * N + N // BATCH + 2 * N)
