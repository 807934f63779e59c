"""The GPT of the main job divided over the tensor axis is the GPT of one process."""

import itertools

import pytest
import torch
from divided import STEPS, compare, entropy, lively
from ranks import run

from fasttrain.dist.mesh import Mesh
from fasttrain.train.model import GPT

DTYPES = {torch.float64: 1e-10, torch.float32: 2e-4}


def gpt(dtype, **options):
    torch.manual_seed(0)
    return lively(GPT(layers=2, width=16, heads=8, positions=12, vocabulary=options.pop("vocabulary", 50), **options)).to(dtype)


def trained(wire, cases, size):
    mesh = Mesh(tensor=size)
    torch.manual_seed(1)
    worst = {}
    for dtype, sequence, loss, options in cases:
        tokens = torch.randint(options.get("vocabulary", 50), (STEPS, 3, 13))
        worst[str((dtype, sequence, loss, options))] = compare(
            gpt(dtype, **options), mesh, list(tokens), entropy, DTYPES[dtype], sequence=sequence, loss=loss)
    return worst


CASES = [(dtype, sequence, "vocabulary", options) for dtype, sequence, options in itertools.product(
    DTYPES, (False, True), (dict(tied=True, kv_heads=4), dict(gated=True, ngrams=3, rows=30)))]


@pytest.mark.parametrize("size", [2, 4])
def test_gpt(size):
    worst = run(trained, size, CASES, size)[0]
    print(worst)
