"""Rows taken by index and combined: eager torch against loops, Triton against eager torch, and compiled ahead."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor

from benchmarks.proof.rows import ALL_CASES, CASES
from fasttrain.kernels import rows as kernel

DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}


def draw(tokens: int, choices: int, columns: int, dtype: torch.dtype, spare: int = 3,
         seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(rows, slots, origins, places, weights): some slots are for nobody, some choices have no slot."""
    numbers = torch.Generator().manual_seed(seed)
    count = tokens * choices
    origins = torch.cat([torch.randperm(count, generator=numbers)[: count - count // 5],
                         torch.full((spare,), -1)])[torch.randperm(count - count // 5 + spare, generator=numbers)]
    places = torch.full((count,), -1)
    for slot, origin in enumerate(origins.tolist()):
        if origin >= 0:
            places[origin] = slot
    weights = torch.rand(tokens, choices, generator=numbers, dtype=kernel.wide(dtype))
    rows, slots = (torch.randn(n, columns, generator=numbers).to(dtype) for n in (tokens, len(origins)))
    return rows, slots, origins, places.view(tokens, choices), weights


def check_products(found: Tensor, exact: Tensor, scale: Tensor, columns: int) -> None:
    """Sums of fp32 products in any order: each of the n - 1 additions and the product round by 2^-24 of the sum of
    magnitudes at most.
    """
    assert bool(((found.double() - exact).abs() <= columns * 2**-24 * scale + 1e-30).all())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_reference_against_loops(dtype: torch.dtype) -> None:
    rows, slots, origins, places, weights = draw(7, 3, 5, dtype)
    taken, summed = kernel.take(rows, origins, 3), kernel.combine(slots, places, weights)
    by_slots, by_weights = kernel.differentiate(rows, slots, origins, weights)
    exact = torch.zeros(7, 3, dtype=torch.float64)
    for slot, origin in enumerate(origins.tolist()):
        row = rows[origin // 3] if origin >= 0 else torch.zeros(5, dtype=dtype)
        assert_same_bits(taken[slot], row)
        factor = weights.flatten()[origin] if origin >= 0 else 0.0
        assert_same_bits(by_slots[slot], (row.to(weights.dtype) * factor).to(dtype))
        if origin >= 0:
            exact[origin // 3, origin % 3] = (row.double() * slots[slot].double()).sum()
    for n in range(7):
        total = torch.zeros(5, dtype=weights.dtype)
        for j, place in enumerate(places[n].tolist()):
            if place >= 0:
                total += weights[n, j] * slots[place].to(weights.dtype)
        assert_same_bits(summed[n], total.to(dtype))
    scale = torch.einsum("nc,njc->nj", rows.double().abs(), slots[places.clamp_min(0)].double().abs())
    check_products(by_weights, exact, scale, 5)
    assert bool((places < 0).any())
    assert bool((origins < 0).any())
    assert_same_bits(kernel.combine(slots, places), kernel.combine(slots, places, torch.ones_like(weights)))


@pytest.mark.parametrize("columns", [1, 256, 1536, 1100], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_against_the_reference(dtype: torch.dtype, columns: int) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    choices = 1 + columns % 3
    rows, slots, origins, places, weights = draw(5, choices, columns, dtype, seed=columns)
    rows[2, -1], slots[1, 0] = math.inf, math.nan
    assert_same_bits(kernel.take(rows, origins, choices, "triton"), kernel.take(rows, origins, choices))
    for factors in (weights, None):
        assert_same_bits(kernel.combine(slots, places, factors, "triton"), kernel.combine(slots, places, factors))
    rows[2, -1], slots[1, 0] = 1.0, 2.0
    by_slots, by_weights = kernel.differentiate(rows, slots, origins, weights, "triton")
    wanted = kernel.differentiate(rows, slots, origins, weights)
    assert_same_bits(by_slots, wanted[0])
    scale = torch.einsum("nc,njc->nj", rows.double().abs(), slots[places.clamp_min(0)].double().abs())
    check_products(by_weights, wanted[1].double(), 2 * scale, columns)
    assert bool((by_weights[places < 0] == 0).all())


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_nothing(backend: str) -> None:
    """No tokens, with slots that are for nobody; no slots; rows without columns."""
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    none, two = torch.full((4,), -1), torch.zeros(4, 2)
    empty, places = torch.zeros(0, 2), torch.zeros(0, 3, dtype=torch.int64)
    assert_same_bits(kernel.take(empty, none, 3, backend), two)
    assert_same_bits(kernel.combine(two, places, torch.zeros(0, 3), backend), empty)
    assert_same_bits(kernel.combine(empty, torch.full((4, 1), -1), None, backend), two)
    by_slots, by_weights = kernel.differentiate(empty, two, none, torch.zeros(0, 3), backend)
    assert_same_bits(by_slots, two)
    assert by_weights.shape == (0, 3)
    assert kernel.take(torch.zeros(4, 0), none, 1, backend).shape == (4, 0)


# --- Compiled ahead ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, storage, arch", [
    pytest.param(*case, marks=() if case in CASES else pytest.mark.slow) for case in ALL_CASES])
def test_compiled(name: str, storage: int, arch: int) -> None:
    """Nothing spills; a thread's share of a whole block is read and written in accesses of 16 bytes."""
    pytest.importorskip("triton", reason="triton is not installed")
    from benchmarks.proof import disassembly
    from fasttrain.kernels import triton_rows

    if disassembly.cuobjdump() is None:
        pytest.skip("no cuobjdump")
    size = 4 if storage == 0 else 2
    wide = triton_rows.BLOCK * size // (16 * 32 * triton_rows.OPTIONS["num_warps"])
    for whole in (True, False):
        (found,) = disassembly.read(triton_rows.compile_ahead(name, storage, arch, whole).asm["cubin"])
        assert (found.local, found.stack) == (0, 0)
        if whole:
            reads = wide * {"take_row": 1, "combine_row": 2, "differentiate_row": 2}[name]
            assert found.loads.get(16, 0) % reads == 0  # as many rounds as the compiler unrolled
            assert found.loads.get(16, 0) >= reads
            assert found.stores.get(16, 0) >= wide
            assert set(found.stores) <= {16, 4}  # 4: that by a weight
