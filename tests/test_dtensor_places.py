"""Where the elements of a shard lie in the whole, and which blocks it cuts."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import ranks
import torch
from helpers import assert_same_bits
from shards import LAYOUTS, assert_same_parts, gradients, placed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.placement_types import _StridedShard

from fasttrain.optim import SGD, AdamW
from fasttrain.optim.local import local, parts, positions
from fasttrain.optim.placing import place
from fasttrain.precision.draws import full_index

# --- Where the elements lie -------------------------------------------------------------------------------------------

def located(wire: Any) -> None:
    for mesh_shape, placements in LAYOUTS.values():
        mesh = init_device_mesh("cpu", mesh_shape)
        for size in ((8, 12), (16, 4, 3), (12,), (8, 1), (1, 8)):
            if any(getattr(one, "dim", 0) >= len(size) for one in placements) or (
                    size[0] % 4 and any(isinstance(one, _StridedShard) for one in placements)):
                continue
            index = torch.arange(torch.Size(size).numel()).view(size)
            tensor = placed(index, mesh, placements)
            mine = local(tensor).flatten()
            for dim, held in enumerate(positions(tensor)):
                stride = index.stride(dim)
                assert torch.equal(held, (mine // stride % size[dim]).unique()) or not len(mine)
            found = full_index(place("p", tensor), len(mine), torch.device("cpu"))
            assert torch.equal(found, mine), (placements, size)
            assert parts(tensor) == 4 // max(1, sum(one.is_replicate() for one in placements) * 2) or mesh.ndim == 1


def test_places_and_positions() -> None:
    ranks.run(located, 4)


# --- Block codes ------------------------------------------------------------------------------------------------------

BLOCK_SIZES = {"p0": (64, 128), "p1": (128, 40), "p2": (4096,), "p3": (66, 128), "p4": (3, 2000)}
CUT = {"rows": "p1 p3 p4", "rows of rows": "p1 p3 p4", "fully_shard over columns": "p1", "strided": "p1",
       "hybrid": "p3 p4", "copies": "", "columns": "p0 p1 p3 p4", "blocks": "p0 p1 p3 p4"}


def blocks(wire: Any, dtype: str) -> None:
    for name, cut in CUT.items():
        mesh_shape, placements = LAYOUTS[name]
        mesh = init_device_mesh("cpu", mesh_shape)
        odd = any(isinstance(one, _StridedShard) for one in placements)  # torch does not put these together again
        named = {key: size for key, size in BLOCK_SIZES.items() if all(
            getattr(one, "dim", 0) < len(size) for one in placements) and not (odd and size[0] % 4)}
        values = gradients(named.values(), 0, torch.bfloat16)
        wholes = dict(zip(named, (nn.Parameter(value.clone()) for value in values), strict=True))
        params = dict(zip(named, (nn.Parameter(placed(value, mesh, placements)) for value in values), strict=True))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            ours = AdamW(params.items(), lr=1e-2, master="split", state_dtype=dtype)
        assert len(told) == bool(cut), "said once"
        assert [key for key in named if any(f"'{key}'" in str(one.message) for one in told)] == cut.split(), name
        theirs = AdamW([{"params": [(key, q)], "state_dtype": "fp32" if key in cut else dtype}
                        for key, q in wholes.items()], lr=1e-2, master="split")
        for step in range(3):
            grads = gradients(named.values(), 1 + step, torch.bfloat16)
            for p, q, grad in zip(params.values(), wholes.values(), grads, strict=True):
                p.grad, q.grad = placed(grad, mesh, placements), grad
            ours.step()
            theirs.step()
        for key, p in params.items():
            assert_same_parts(p, wholes[key].detach(), f"{name}, {key}")
            for state, value in theirs.state[wholes[key]].items():
                mine = ours.state[p][state]
                if state == "step":
                    assert_same_bits(mine, value)
                else:
                    assert_same_parts(mine, value, f"{name}, {key}: {state}")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_block_codes_where_shards_cut_no_block(dtype: str) -> None:
    """Elsewhere the states are fp32, on every rank alike, and the constructor says so."""
    ranks.run(blocks, 4, dtype)


def resting(wire: Any) -> None:
    """What a parameter without a gradient draws for its EMA is that of the whole."""
    for shape, placements in LAYOUTS.values():
        mesh = init_device_mesh("cpu", shape)
        value, grad = gradients(((8, 12),), 5, torch.float32)[0], torch.ones(8, 12)
        whole, part = nn.Parameter(value), nn.Parameter(placed(value, mesh, placements))
        ours, theirs = (SGD([("w", p)], lr=0.1, ema_decay=0.99, ema_dtype="bf16") for p in (part, whole))
        part.grad, whole.grad = placed(grad, mesh, placements), grad
        for step in range(4):
            ours.step()
            theirs.step()
            assert_same_parts(ours.state[part]["ema"], theirs.state[whole]["ema"], f"{placements}, step {step}")
            part.grad = whole.grad = None


def test_a_resting_average_is_rounded_as_the_whole() -> None:
    ranks.run(resting, 4)
