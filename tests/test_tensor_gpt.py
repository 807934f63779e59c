"""The GPT of the main job divided over the tensor axis is the GPT of one process."""

from __future__ import annotations

from typing import Any

import torch
from divided import STEPS, compare, entropy, lively
from ranks import run
from torch import nn

from fasttrain.dist.mesh import Mesh
from fasttrain.parallel.tensor import tensor_parallel
from fasttrain.parallel.tensor.partial import declared
from fasttrain.train.model import GPT

EXACT = (torch.float64, 1e-10)
# Relative to the largest element of a tensor: sums of up to 36 products and 64 features in another order, and AdamW's
# quotient of such a gradient by its own root. 1.2e-5 was measured.
SINGLE = (torch.float32, 1e-4)
CASES: list[tuple[tuple[torch.dtype, float], dict[str, Any], dict[str, Any]]] = [
    (EXACT, dict(tied=True, kv_heads=4), dict(sequence=False)),
    (EXACT, dict(tied=True, vocabulary=49), dict(sequence=True)),
    (EXACT, dict(gated=True, ngrams=3, rows=30), dict(sequence=True, loss="whole")),
    (EXACT, dict(gated=True, kv_heads=4, vocabulary=49), dict(sequence=False, loss="whole")),
    (SINGLE, dict(tied=True, gated=True, kv_heads=4), dict(sequence=True)),
    (SINGLE, dict(ngrams=2, rows=31), dict(sequence=False)),
]


def gpt(dtype: torch.dtype, **options: Any) -> nn.Module:
    return lively(GPT(**{**dict(layers=2, width=16, heads=8, positions=12, vocabulary=48), **options})).to(dtype)


def trained(wire: Any) -> list[dict[str, float]]:
    worst = []
    for size, cases in ((4, CASES), (2, CASES[::2])):
        mesh = Mesh(tensor=size)
        for (dtype, bound), model, plan in cases:
            torch.manual_seed(1)
            batches = list(torch.randint(48, (STEPS, 3, 13)))
            worst.append(compare(gpt(dtype, **model), mesh, batches, entropy, bound, **plan))
    return worst


def test_divided_by_four_and_by_two() -> None:
    """Losses, gradients, norms and parameters, over steps with clipping; shared and own keys, gates, tied heads."""
    answers = run(trained, 4)
    assert all(answer == answers[0] for answer in answers[1:]), "the ranks compared different numbers"


def in_parts(wire: Any) -> None:
    """A rank of a pipeline has some parts; positions stay divided between them."""
    mesh = Mesh(tensor=2)
    whole, halves = (gpt(torch.float64) for _ in range(2)), [gpt(torch.float64) for _ in range(2)]
    alone, divided = whole
    parts = divided.parts()
    for half, kept in zip(halves, (parts[:2], parts[2:]), strict=True):
        half.keep(kept)
        tensor_parallel(half, mesh, sequence=True)
    with torch.device("meta"):
        empty = tensor_parallel(GPT(layers=1, width=16, heads=8, positions=12), mesh)
    assert all(p.is_meta for p in empty.parameters())
    tokens = torch.arange(24).view(2, 12)
    x = halves[0].run(parts[:2], tokens)
    assert x.shape == (2, 6, 16)
    torch.testing.assert_close(halves[1].run(parts[2:], x).full_tensor(), alone(tokens))
    names = [name for half in halves for name, p in half.named_parameters() if declared(p)]
    assert names == [name for name, _ in alone.named_parameters() if "norm" in name]


def test_parts_of_a_pipeline() -> None:
    run(in_parts, 2)
