"""Sums of the chunks of several ranks, and codes of 8 bits: in the order of ranks, the same bits everywhere."""

import math
from itertools import product

import invariance
import pytest
import torch
from helpers import REALS, assert_same_bits, generator, needs_native, normal, specials, usable
from torch import Tensor

from benchmarks import bench_pack
from fasttrain.kernels import native, norm
from fasttrain.kernels.chunks import encode_int8, sum_chunks, sum_int8, traffic
from fasttrain.precision import codecs

BACKENDS = [pytest.param(name, marks=pytest.mark.skipif(usable(name) is not None, reason=str(usable(name))))
            for name in ("reference", "cpu", "triton")]
SIZES = (0, 1, 17, 1024, 70_001)
INT8 = codecs.NUMBER["int8"]


def chunks_of(ranks: int, size: int, dtype: torch.dtype, numbers: torch.Generator) -> Tensor:
    made = normal((ranks, size), dtype, numbers)
    special = torch.tensor(specials(dtype), dtype=torch.float64).to(dtype)
    if size > 100:
        made[:, 50 : 50 + len(special)] = special
        made[-1, 30 : 30 + len(special)] = special
    return made


def in_order(chunks: Tensor, out: torch.dtype, scale: float) -> Tensor:
    """The witness: one addition of torch after the other."""
    kind = torch.float64 if torch.float64 in (chunks.dtype, out) else torch.float32
    total = chunks[0].to(kind)
    for chunk in chunks[1:]:
        total = total + chunk.to(kind)
    return (total * torch.tensor(scale, dtype=kind)).to(out)


@pytest.mark.parametrize("source, target", list(product(REALS, REALS)), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pair_of_dtypes(backend: str, source: torch.dtype, target: torch.dtype) -> None:
    numbers = generator(1)
    turn = 4 * REALS.index(source) + REALS.index(target)
    few = [] if backend == "triton" else product((1, 2, 4, 5), SIZES[:-1])
    for ranks, size in (*few, (1 + turn % 5, SIZES[-1])):
        chunks = chunks_of(ranks, size, source, numbers)
        out = torch.full((size + 2,), 77.0, dtype=target)
        sums, nonfinite = sum_chunks(chunks, out[1:-1], 1 / 3, squares=True, backend=backend)
        assert_same_bits(out[1:-1], in_order(chunks, target, 1 / 3), f"{ranks} ranks, {size} elements")
        assert out[0] == out[-1] == 77
        wanted, flag = norm.reference([out[1:-1]])
        assert nonfinite.dtype == torch.bool
        assert bool(nonfinite) == bool(flag) == bool(size > 100)
        if backend != "triton":
            assert_same_bits(sums, wanted[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_squares_of_what_is_stored(backend: str) -> None:
    chunks = normal((2, 200_003), torch.float32, generator(2))
    out = torch.empty(200_003, dtype=torch.bfloat16)
    sums, nonfinite = sum_chunks(chunks, out, 0.5, squares=True, backend=backend)
    wanted = norm.squares([out])[0][0]
    assert sums.shape == nonfinite.shape == ()
    assert sums.dtype == torch.float64
    assert not nonfinite
    if backend == "triton":
        assert abs(sums - wanted) <= 2**-40 * wanted  # another order: at most log2(2^18) + 1 roundings of 2^-53 a level
    else:
        assert_same_bits(sums, wanted)
    assert sum_chunks(chunks, out, backend=backend) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_may_be_a_chunk(backend: str) -> None:
    numbers = generator(3)
    for rank in range(3):
        chunks = normal((3, 5000), torch.bfloat16, numbers)
        wanted = in_order(chunks, torch.bfloat16, 1.0)
        version = chunks._version
        sum_chunks(chunks, chunks[rank], backend=backend)
        assert_same_bits(chunks[rank], wanted, f"rank {rank}")
        assert chunks._version > version


def test_sixteen_bits_are_added_in_32() -> None:
    """A sum in bfloat16 would stay at 256."""
    out = torch.empty(100, dtype=torch.bfloat16)
    sum_chunks([torch.full((100,), 256.0, dtype=torch.bfloat16), *[torch.ones(100, dtype=torch.bfloat16)] * 8], out)
    assert (out == 264).all()


def test_the_order_is_that_of_the_ranks() -> None:
    chunks = torch.tensor([[2.0**24], [1.0], [1.0]])
    out = torch.empty(1)
    sum_chunks(chunks, out)
    assert out.item() == 2**24
    sum_chunks(chunks.flip(0), out)
    assert out.item() == 2**24 + 2


def contents(numbers: torch.Generator) -> dict[str, Tensor]:
    return {
        "normal": normal((5000,), torch.float32, numbers),
        "wide": normal((3000,), torch.float32, numbers) * 10.0 ** torch.randint(-40, 38, (3000,), generator=numbers),
        "special": torch.cat([torch.tensor(specials(torch.float32)), torch.ones(1000)]),
        "zero": torch.zeros(300), "empty": torch.zeros(0), "one": torch.tensor([-3.0]),
    }


def encoded(values: Tensor, residual: Tensor | None, backend: str) -> tuple[Tensor, ...]:
    codes = torch.full(values.shape, 99, dtype=torch.int8)
    units = torch.full((-(-len(values) // 256),), 99.0)
    kept = None if residual is None else residual.clone()
    encode_int8(values, codes, units, 0.3, kept, backend)
    return (codes, units) if kept is None else (codes, units, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_codes_have_the_bits_of_the_reference(backend: str, dtype: torch.dtype) -> None:
    numbers = generator(4)
    for what, content in contents(numbers).items():
        values = content.to(dtype)
        for residual in (None, normal(values.shape, torch.float32, numbers), normal(values.shape, dtype, numbers)):
            got, wanted = encoded(values, residual, backend), encoded(values, residual, "reference")
            for name, one, other in zip(("codes", "units", "residual"), got, wanted, strict=False):
                assert_same_bits(one, other, f"{what}, {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_codes(backend: str, dtype: torch.dtype) -> None:
    numbers = generator(5)
    for size in (0, 1, 256, 70_001):
        made = [encoded(normal((size,), torch.float32, numbers) * 3.0**rank, None, "reference") for rank in range(3)]
        out = torch.full((size,), 77.0, dtype=dtype)
        measured = sum_int8([codes for codes, _ in made], [units for _, units in made], out, 0.5, True, backend)
        decoded = torch.stack([codecs.decode(INT8, *pair, size) for pair in made])
        assert_same_bits(out, in_order(decoded, dtype, 0.5), f"{size} elements")
        assert not measured[1]
        assert math.isclose(measured[0], norm.squares([out])[0][0], rel_tol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_lost_for_good(backend: str) -> None:
    numbers = generator(6)
    residual, (sent, meant) = torch.zeros(1000), torch.zeros(2, 1000, dtype=torch.float64)
    codes, units, out = torch.empty(1000, dtype=torch.int8), torch.empty(4), torch.empty(1000)
    for _ in range(8):
        gradient = normal((1000,), torch.float32, numbers)
        encode_int8(gradient, codes, units, 1.0, residual, backend)
        sum_int8([codes], [units], out, backend=backend)
        sent += out
        meant += gradient.double()
    # Each step rounds the sum and the difference of numbers below 8 in fp32; all else that is missing is the residual.
    assert (sent + residual - meant).abs().max() <= 8 * 2 * 2**-22
    assert (sent - meant).abs().max() > 2**-10
    # The largest gap between codes is 127^2 - 126^2 of 127^2 units, half of which a code is off.
    assert residual.abs().max() <= 253 / 2 * 8 / 127**2


def test_a_broken_block_has_no_residual() -> None:
    gradient = torch.ones(600)
    gradient[300] = math.inf
    for backend in ("reference", "cpu") if usable("cpu") is None else ("reference",):
        codes, units, residual = encoded(gradient, torch.full((600,), 0.01), backend)
        assert units.isnan().tolist() == [False, True, False]
        assert not residual[256:512].any()
        assert not codes[256:512].any()


CODE = """
import torch
from fasttrain.kernels import native
from fasttrain.kernels.chunks import encode_int8, sum_chunks, sum_int8
numbers = torch.Generator().manual_seed(8)
size = 300_001
found = []
chunks = torch.randn(3, size, generator=numbers, dtype=torch.float64)
for threads in (1, 2, 5):
    torch.set_num_threads(threads)
    for kind in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        out = [torch.empty(size) for _ in "ab"]
        sums = [sum_chunks(chunks.to(kind), to, 0.3, True, backend) for to, backend in zip(out, ("reference", "cpu"))]
        assert torch.equal(*out) and sums[0] == sums[1], (threads, kind)
    codes, units, residual = torch.empty(size, dtype=torch.int8), torch.empty(1172), torch.zeros(size)
    encode_int8(chunks[0].float(), codes, units, 0.3, residual)
    sums = sum_int8([codes] * 2, [units] * 2, out[0], squares=True)
    found.append([codes, units, residual, out[0], sums[0]])
assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
print(native.module().isa())
"""


@needs_native
@pytest.mark.parametrize("isa", native.build_info().get("isas", []))
def test_instruction_sets_and_threads_do_not_matter(isa: str) -> None:
    invariance.check_on_one(isa, CODE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_is_named_and_writes_nothing(backend: str) -> None:
    memory = torch.zeros(20)
    out, codes, units = torch.zeros(10), torch.zeros(10, dtype=torch.int8), torch.zeros(1)
    for error, message, call in (
            (ValueError, "there is no chunk", lambda: sum_chunks([], out, backend=backend)),
            (ValueError, "chunk 1 has 9 elements", lambda: sum_chunks([out + 1, torch.ones(9)], out, backend=backend)),
            (ValueError, r"chunk 1 is torch.float64 and chunk 0 torch.float32",
             lambda: sum_chunks([out + 1, out.double()], out, backend=backend)),
            (ValueError, "chunk 0 shares a part of its memory",
             lambda: sum_chunks([memory[1:11]], memory[:10], backend=backend)),
            (TypeError, "out is int64", lambda: sum_chunks([out], out.long(), backend=backend)),
            (TypeError, "the bucket is float64", lambda: encode_int8(out.double(), codes, units, backend=backend)),
            (ValueError, "the codes are torch.uint8",
             lambda: encode_int8(out, codes.to(torch.uint8), units, backend=backend)),
            (ValueError, r"the units are torch.float32 of shape .2,.: .* shape .1,.",
             lambda: encode_int8(out, codes, torch.zeros(2), backend=backend)),
            (ValueError, "the residual has 3 elements",
             lambda: encode_int8(out, codes, units, 1.0, torch.zeros(3), backend=backend)),
            (TypeError, "the residual is float64",
             lambda: encode_int8(out, codes, units, 1.0, torch.zeros(10).double(), backend=backend)),
            (ValueError, "1 tensors of codes and 0 of units", lambda: sum_int8([codes], [], out, backend=backend)),
            (ValueError, "the codes of rank 1 are torch.int8 of shape",
             lambda: sum_int8([codes, codes[:5]], [units, units], out, backend=backend))):
        with pytest.raises(error, match=message):
            call()
    assert not memory.any()
    assert not out.any()


def test_bytes() -> None:
    """Half of the bytes of fp32 as bf16, a quarter as codes, and nothing is read twice."""
    n = 1 << 20
    assert traffic(n, [torch.float32], [torch.bfloat16]) == {"bytes_read": 4 * n, "bytes_written": 2 * n}
    assert traffic(n, [], [torch.float32], coded_read=4) == {"bytes_read": 4 * (n + n // 64), "bytes_written": 4 * n}


@needs_native
def test_the_benchmark_runs() -> None:
    figures = bench_pack.run(tensors=3, elements=1000, rounds=2)
    assert [row["bytes"] // 3000 for row in figures["rows"]] == [8, 8, 6, 6, 8, 12, 10, 13, 8]
    assert all(row["work"] in bench_pack.report(figures) for row in figures["rows"])
