"""Symmetric products in Triton's interpreter against float64; tests/test_symmetric_compile.py is about their code, and
tests/test_gpu_symmetric.py runs it.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers import assert_same_bits, generator, normal, usable
from torch import Tensor
from torch.nn import Parameter

from fasttrain.kernels import symmetric, triton_products
from fasttrain.kernels.triton import wrapped
from fasttrain.kernels.triton_codecs import bfloat16_bits
from fasttrain.optim import Muon
from fasttrain.optim.newton_schulz import orthogonalize
from fasttrain.optim.workspace import Workspace

if TYPE_CHECKING:  # bound when the functions are wrapped
    import triton.language as tl

    from fasttrain.kernels.triton_products import corner, place

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # infinities are tested
              pytest.mark.skipif(bool(usable("triton")), reason=str(usable("triton")))]
triton_symmetric = pytest.importorskip("fasttrain.kernels.triton_symmetric")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (1, 7, 63, 64, 65, 129)
# Every size as a side, wide and tall, with every dtype; batches of one to three.
CASES = [(dtype, 1 + i % 3, *((side, other) if (i + j) % 2 else (other, side)))
         for j, dtype in enumerate(DTYPES) for i, side in enumerate(SIZES)
         for other in [max(side, SIZES[(2 * i + j) % 6])]]
ALL_CASES = [case for case in itertools.product(DTYPES, (1, 2), SIZES, SIZES) if case not in CASES]
PARAMETERS = [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL_CASES)]


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor in the middle of its storage, all of it NaN."""
    storage = torch.full((math.prod(shape) + 64,), math.nan, dtype=dtype)
    return storage[32:-32].view(shape), storage


def assert_near(got: Tensor, exact: Tensor, magnitudes: Tensor, sums: int, what: str) -> None:
    """One rounding to the result's dtype of what was added up in float32: `sums` roundings of sums of magnitudes."""
    accumulated = sums * 2.0**-24 * magnitudes
    unit = torch.finfo(got.dtype).eps / 2
    bound = accumulated + unit * (exact.abs() + accumulated) + torch.finfo(got.dtype).smallest_normal * unit
    excess = (got.double() - exact).abs() - bound
    assert bool((excess <= 0).all()), f"{what}: {excess.max().item():.3g} beyond the bound"


def assert_whole(out: Tensor, storage: Tensor) -> None:
    """Symmetric to the bit, everything written, nothing around it."""
    assert_same_bits(out.mT, out, "against its transpose")
    assert bool(out.isfinite().all())
    assert bool(torch.cat([storage[:32], storage[-32:]]).isnan().all()), "written outside"


@pytest.mark.parametrize("dtype, batch, rows, columns", PARAMETERS, ids=str)
def test_products(dtype: torch.dtype, batch: int, rows: int, columns: int) -> None:
    """X X^T or X^T X, then b A + c A A of that."""
    x = normal((batch, rows, columns), dtype, generator(rows + columns)) / 4
    side, length, exact = min(rows, columns), max(rows, columns), x.double()
    out, storage = poisoned((batch, side, side), dtype)
    triton_symmetric.gram(x, out)
    assert_whole(out, storage)
    left, right = (exact.mT, exact) if rows > columns else (exact, exact.mT)
    assert_near(out, left @ right, left.abs() @ right.abs(), length, "gram")

    result, storage = poisoned(tuple(out.shape), dtype)
    triton_symmetric.polynomial(out, -4.775, 2.0315, result)
    assert_whole(result, storage)
    exact, b, c = out.double(), np.float32(-4.775).item(), np.float32(2.0315).item()
    assert_near(result, b * exact + c * exact @ exact, abs(b) * exact.abs() + c * exact.abs() @ exact.abs(), side + 3,
                "polynomial")


@pytest.mark.parametrize("cut", [(16, 32), (32, 64), (128, 32)], ids=str)
def test_other_tilings(cut: tuple[int, int]) -> None:
    """Many tiles, groups of columns that are not full among them, and one tile; the same numbers as torch's float32."""
    x = normal((1, 100, 75), torch.float32, generator(1))
    got, wanted = torch.empty(1, 75, 75), torch.empty(1, 75, 75)
    triton_symmetric.gram(x, got, triton_symmetric.Tiling(*cut, 4, 2))
    symmetric.gram(x, wanted)
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-4)


def test_what_lies_below_the_diagonal_is_not_read_off() -> None:
    """Of a matrix that is not symmetric the result still is: each element below the diagonal is the one above."""
    a = normal((1, 100, 100), torch.bfloat16, generator(2))
    out, storage = poisoned((1, 100, 100), torch.bfloat16)
    triton_symmetric.polynomial(a, 10.0, 0.5, out)
    assert_whole(out, storage)


def test_infinities_stay_in_their_row() -> None:
    """What is masked is no operand."""
    x = torch.ones(1, 70, 90)
    x[0, 69, 89], x[0, 3, 0] = math.inf, math.nan
    out = torch.empty(1, 70, 70)
    triton_symmetric.gram(x, out)
    assert bool(out[0, 69, :3].isinf().all())
    assert bool(out[0, 3].isnan().all())
    rest = [i for i in range(70) if i not in (3, 69)]
    assert bool((out[0][rest][:, rest] == 90).all())


# --- The order of programs --------------------------------------------------------------------------------------------

def corners(numbers, rows, columns, size: tl.constexpr):
    """A kernel: the corner of each number."""
    offsets = tl.arange(0, size)
    row, column = corner(tl.load(numbers + offsets))
    tl.store(rows + offsets, row)
    tl.store(columns + offsets, column)


def places(rows, columns, tiles, group: tl.constexpr, size: tl.constexpr):
    """A kernel: the place of each program."""
    offsets = tl.arange(0, size)
    row, column = place(offsets, tiles, group)
    tl.store(rows + offsets, row)
    tl.store(columns + offsets, column)


@pytest.fixture(scope="module")
def probes() -> dict[str, Any]:
    return wrapped([bfloat16_bits, *triton_products.FUNCTIONS, corners, places], True)


def test_corners_to_the_largest_matrices(probes: dict[str, Any]) -> None:
    """The root is taken in float32, which is off for large numbers, and put right."""
    around = [column * (column + 1) // 2 + shift for column in range(1, 23_000, 17) for shift in (-1, 0, 1)]
    numbers = torch.tensor((around + [0] * 4096)[:4096], dtype=torch.int32)
    rows, columns = torch.empty_like(numbers), torch.empty_like(numbers)
    probes["corners"][(1,)](numbers, rows, columns, size=4096)
    for number, row, column in zip(numbers.tolist(), rows.tolist(), columns.tolist(), strict=True):
        wanted = (math.isqrt(8 * number + 1) - 1) // 2
        assert (row, column) == (number - wanted * (wanted + 1) // 2, wanted)


@pytest.mark.parametrize("tiles", [1, 2, 7, 8, 9, 16, 21, 40])
def test_every_tile_above_the_diagonal_is_computed_once(probes: dict[str, Any], tiles: int) -> None:
    count = triton_symmetric.Tiling(64, 64, 4, 4).programs(1, 64 * tiles)
    assert count == tiles * (tiles + 1) // 2
    rows, columns = torch.empty(1024, dtype=torch.int32), torch.empty(1024, dtype=torch.int32)
    probes["places"][(1,)](rows, columns, tiles, group=triton_symmetric.GROUP, size=1024)
    found = list(zip(rows[:count].tolist(), columns[:count].tolist(), strict=True))
    assert sorted(found) == [(row, column) for row in range(tiles) for column in range(row, tiles)]
    for begin in range(0, count - 64, 64):  # 64 programs read 8 + 8 lines at best, and 1 + 64 column by column
        together = found[begin : begin + 64]
        assert len({row for row, _ in together} | {column for _, column in together}) <= 26


def test_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch for a batch, of n (n + 1) / 2 programs for each matrix of n tiles a side; nothing is allocated."""
    launched = []

    class Launch:
        def __getitem__(self, grid):
            launched.append(grid)
            return lambda *arguments, **constants: None

    monkeypatch.setattr(triton_symmetric, "kernel", lambda interpreted: Launch())
    out = torch.empty(3, 320, 320)
    triton_symmetric.gram(torch.empty(3, 320, 400), out)
    triton_symmetric.polynomial(out, 1.0, 1.0, torch.empty_like(out))
    triton_symmetric.gram(torch.empty(0, 320, 400), out[:0])
    assert launched == [(3 * 15,), (3 * 15,)]


@pytest.mark.parametrize("batch, side, tile", [(1, 768, 64), (12, 768, 128), (1, 128, 64), (8, 2048, 128)])
def test_few_matrices_take_small_tiles(batch: int, side: int, tile: int) -> None:
    for major in (8, 9, 10):
        assert triton_symmetric.tiling(torch.bfloat16, batch, side, 4 * side, major, 132).tile == tile


# --- Where they are used ----------------------------------------------------------------------------------------------

def test_who_multiplies() -> None:
    torchs = (symmetric.gram, symmetric.polynomial)
    tritons = (triton_symmetric.gram, triton_symmetric.polynomial)
    fits = torch.empty(2, 96, 80, dtype=torch.bfloat16)
    assert symmetric.products(fits) == torchs
    assert symmetric.products(fits, "reference") == torchs
    assert symmetric.products(fits, "triton") == tritons
    assert symmetric.products(fits.half(), "triton") == tritons
    for other in (fits.float(), fits.double(), fits[:, :88], fits[:, :, :72], fits[:, :64]):
        assert symmetric.products(other, "triton") == torchs


@pytest.mark.parametrize("shape", [(1, 80, 96), (1, 96, 80)], ids=str)
def test_orthogonalize(shape: tuple[int, ...]) -> None:
    """Five steps in bfloat16 are as near to float64 as torch's are, and nothing is allocated by the second time."""
    numbers, coefficients = generator(3), (3.4445, -4.7750, 2.0315)
    x = normal(shape, torch.bfloat16, numbers)
    exact = orthogonalize(x.double(), coefficients, 5, 1e-7, Workspace())
    space, off = Workspace(), {}
    for backend in ("triton", "reference"):
        got = orthogonalize(x.clone(), coefficients, 5, 1e-7, space, backend)
        off[backend] = ((got.double() - exact).norm() / exact.norm()).item()
    assert 0 < off["triton"] < 1.2 * off["reference"] < 0.05
    before = {key: tensor.data_ptr() for key, tensor in space._memory.items()}
    orthogonalize(x.clone(), coefficients, 5, 1e-7, space, "triton")
    assert before == {key: tensor.data_ptr() for key, tensor in space._memory.items()}


def test_muon() -> None:
    """A step whose products are Triton's is within 3% of the update of one whose products are torch's."""
    start, grad = (normal((80, 96), torch.float32, generator(seed)) for seed in (4, 5))
    moved = {}
    for backend in ("triton", "reference"):
        p = Parameter(start.clone())
        p.grad = grad.clone()
        Muon([p], lr=0.1, weight_decay=0.0, backend=backend).step()
        moved[backend] = p.detach() - start
    assert 0 < (moved["triton"] - moved["reference"]).norm() <= 0.03 * moved["reference"].norm()


# --- What is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("x, out, message", [
    (torch.ones(2, 3), torch.ones(2, 2), "takes contiguous batches of matrices"),
    (torch.ones(1, 2, 3).double(), torch.ones(1, 2, 2).double(), "takes contiguous batches .* torch.float64"),
    (torch.ones(1, 3, 2).mT, torch.ones(1, 2, 2), "takes contiguous batches"),
    (torch.ones(1, 2, 3), torch.ones(1, 3, 3), r"shape \(1, 2, 2\) on cpu, and got torch.float32 of shape \(1, 3, 3\)"),
    (torch.ones(1, 2, 3), torch.ones(1, 2, 2).half(), "got torch.float16"),
    (torch.ones(2, 2, 3), torch.ones(2, 2, 2).mT, "is contiguous"),
    (torch.empty(1, 1, 1 << 24), torch.ones(1, 1, 1), "fewer than 16777216"),
])  # fmt: skip
def test_errors(x: Tensor, out: Tensor, message: str) -> None:
    before = out.clone()
    with pytest.raises(ValueError, match=message):
        triton_symmetric.gram(x, out)
    assert_same_bits(out, before)


def test_a_polynomial_of_what_is_not_square() -> None:
    with pytest.raises(ValueError, match=r"takes square matrices, and got \(1, 2, 3\)"):
        triton_symmetric.polynomial(torch.ones(1, 2, 3), 1.0, 1.0, torch.ones(1, 2, 2))
    same = torch.ones(1, 2, 2)
    with pytest.raises(ValueError, match="not in the memory"):
        triton_symmetric.polynomial(same, 1.0, 1.0, same)
