"""The CUDA kernels of buckets, walked on the host (tests/cuda_host.py): every bit of the reference."""

from __future__ import annotations

import math
from itertools import product

import cuda_host
import pytest
import torch
from helpers import REALS, assert_same_bits, generator, needs_native, normal, specials
from test_cuda_walk import GUARD, guarded
from torch import Tensor

from fasttrain.kernels import cuda, cuda_pack, native, norm, pack
from fasttrain.kernels.chunks import encode_int8, sum_chunks, sum_int8
from fasttrain.kernels.pack import Slots

pytestmark = needs_native

DTYPES = {name: dtype for dtype, name in cuda.NAMES.items()} | {"INT8": torch.int8}
NAMES = sorted(name for name in (native.module().cuda_kernels() if native.load()[0] is not None else [])
               if name.startswith(("move_", "encode_", "sum_")))
MOVES = [name for name in NAMES if name.startswith("move_")]
ENCODES = [name for name in NAMES if name.startswith("encode_")]
SUMS = [name for name in NAMES if name.startswith("sum_") and "INT8" not in name]
CODED = [name for name in NAMES if name.startswith("sum_INT8")]
SIZES = (0, 1, 2, 7, 8, 9, 63, 257, 4095, 4099, 9001)
OFFSETS = ((0, 0, 0), (1, 1, 1), (8, 8, 8), (3, 3, 3), (1, 0, 2))


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(cuda, "why_not", lambda where: None)
    return cuda_host.install(monkeypatch)


def kinds(name: str) -> list[torch.dtype]:
    return [DTYPES[kind] for kind in name.split("_")[1:]]


def values(size: int, dtype: torch.dtype, numbers: torch.Generator) -> Tensor:
    """Random numbers; if there are many, special ones among them."""
    made, special = normal((size,), dtype, numbers), torch.tensor(specials(dtype), dtype=torch.float64).to(dtype)
    if size >= 200:
        made[100 : 100 + len(special)] = special
    return made


def test_what_is_compiled():
    """What docs/buckets.md says: the 16-bit storages and float32 in every pair, float64 beside itself and float32."""
    narrow = {f"{a}_{b}" for a, b in product(("F32", "BF16", "F16"), repeat=2)}
    wide = {"F64_F64", "F64_F32", "F32_F64"}
    lost = {"F32_BF16_F32", "F32_F16_F32", "BF16_BF16_F32", "F16_F16_F32"}
    assert set(MOVES) == {f"move_{kind}" for kind in narrow | wide | lost}
    assert set(SUMS) == {f"sum_{kind}" for kind in narrow - {"BF16_F16", "F16_BF16"} | {"F64_F64"}}
    assert set(CODED) == {"sum_INT8_F32", "sum_INT8_BF16", "sum_INT8_F16"}
    assert set(ENCODES) == {"encode_" + kind for kind in ("F32", "BF16", "F16", "F32_F32", "BF16_F32", "F16_F32")}


# --- Moves ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MOVES)
def test_moves(device, name):
    """Every size, aligned and misaligned alike and apart, many at once and one alone; no write beside them."""
    source, target, *lost = kinds(name)
    numbers = generator(1)
    for scale, offsets in zip((1 / 3, 1.0, -0.5, 2.0**40, 1 / 3), OFFSETS, strict=True):
        sources = [guarded(values(size, source, numbers), offsets[0]) for size in SIZES]
        wanted, made = [], []
        for one in sources:
            owed = [guarded(normal((one.count,), dtype, numbers) * 0.01, offsets[2]) for dtype in lost]
            moved = [guarded(torch.full((one.count,), 5.0, dtype=target), offsets[1]), *owed]
            made.append(moved)
            wanted.append([array.view.clone() for array in moved])
            pack.move(one.view, wanted[-1][0], scale, *wanted[-1][1:])
        moves = [(one.view, to.view, owed[0].view if owed else None)
                 for one, (to, *owed) in zip(sources, made, strict=True)]
        device.warps, device.grid = 1 + offsets[1] % 3, (None, 1, 3)[offsets[0] % 3]
        device.launches.clear()
        cuda_pack.move(moves[:-1], scale)
        cuda_pack.move(moves[-1:], scale)
        assert [launched for launched, _ in device.launches] == [name] * 2
        for moved, right in zip(made, wanted, strict=True):
            for one, other in zip(moved, right, strict=True):
                assert_same_bits(one.view, other, f"{one.count} elements, offsets {offsets}")
                assert one.untouched(), "memory beside a tensor was written"
        for one in sources:
            assert one.untouched()


@pytest.mark.parametrize("name", [name for name in MOVES if len(set(kinds(name)[:2])) == 1 and len(kinds(name)) == 2])
def test_a_slot_may_be_moved_into_itself(device, name):
    dtype = kinds(name)[0]
    numbers = values(5003, dtype, generator(2))
    wanted = numbers.clone()
    pack.move(wanted, wanted, 0.3)
    cuda_pack.move([(numbers, numbers, None)], 0.3)
    assert_same_bits(numbers, wanted)


@pytest.mark.parametrize(("name", "wide", "single"), [
    ("move_F32_F32", 2 * 1024, 0), ("move_F32_BF16", 1024 + 512, 0), ("move_BF16_BF16_F32", 2 * (512 + 1024), 0),
    ("move_F64_F32", 2048 + 1024, 0)])
def test_accesses_of_moves_are_wide(device, name, wide, single):
    source, target, *lost = kinds(name)
    arrays = [torch.ones(4096, dtype=dtype) for dtype in (source, target, *lost)]
    cuda_pack.move([(arrays[0], arrays[1], arrays[2] if lost else None)], 0.5)
    assert device.counts[name] == (wide, single)


def test_many_storages_and_what_has_no_kernel(device):
    """One launch for each combination; float64 beside 16 bits, and residuals of 16 bits, are another backend's."""
    numbers = generator(3)
    tensors = [values(size, dtype, numbers) for size in (300, 0, 5001) for dtype in REALS]
    offsets = [5008 * index for index in range(len(tensors))]
    room = 5008 * len(tensors)
    for target, lost, launches in ((torch.bfloat16, None, 3), (torch.float32, None, 4), (torch.float64, None, 2),
                                   (torch.bfloat16, torch.float32, 2), (torch.bfloat16, torch.bfloat16, 0)):
        found = []
        for backend in ("reference", "cuda"):
            residual = None if lost is None else torch.full((room,), 0.01, dtype=lost)
            slots = Slots(torch.full((room,), GUARD, dtype=target), tensors, offsets, residual, backend)
            device.launches.clear()
            slots.pack_all(tensors, 1 / 3)
            back = [torch.zeros_like(tensor) for tensor in tensors]
            assert len(device.launches) == (launches if backend == "cuda" else 0)
            slots.unpack_all(back, 3.0)
            found.append([slots.bucket, *back, *([] if residual is None else [residual])])
            assert slots.moved["launches"] == 2
        for got, wanted in zip(found[1], found[0], strict=True):
            assert_same_bits(got, wanted, f"{target}, {lost}")


def test_a_slot_is_packed_without_a_copy(device):
    """Wherever the tensor lies: the table of a slot stays on the device."""
    params = [torch.ones(5000), torch.ones(7)]
    slots = Slots(torch.zeros(5008, dtype=torch.bfloat16), params, [0, 5000], torch.zeros(5008), "cuda")
    keep = []
    for step in range(4):
        for index, p in enumerate(params):
            keep.append(torch.full_like(p, step + 1.5))  # elsewhere each time
            slots.pack(index, keep[-1], 0.5)
        assert len(device.uploads) == 2
        assert_same_bits(slots.views[0], (keep[-2] * 0.5).bfloat16())
        assert_same_bits(slots.views[1], (keep[-1] * 0.5).bfloat16())
    slots.pack(0, params[0], 0.25)
    assert len(device.uploads) == 3
    assert_same_bits(slots.views[0], (params[0] * 0.25).bfloat16())


def test_tables_of_all_slots_stay(device):
    tensors = [torch.ones(5000), torch.ones(7)]
    slots = Slots(torch.zeros(5007, dtype=torch.bfloat16), tensors, [0, 5000], backend="cuda")
    slots.pack_all(tensors)
    tensors[1].fill_(3.0)
    slots.pack_all(tensors)
    assert slots.bucket.float().sum() == 5021
    assert len(device.uploads) == 1
    moved = [torch.full((5000,), 2.0), tensors[1]]
    slots.pack_all(moved)
    assert slots.bucket.float().sum() == 10_021
    assert device.uploads[1:] == [8 * (5 + 1)], "of two chunks of five words, from the first address to the last"
    device.graph = True
    slots.pack_all(tensors)  # in a table of its own
    device.graph = False
    moved[1] = torch.zeros(7)
    slots.pack_all(moved)
    assert slots.bucket.float().sum() == 10_000
    assert len(cuda_pack.kept.known) == 1


# --- Codes ------------------------------------------------------------------------------------------------------------

def contents(dtype: torch.dtype, size: int, numbers: torch.Generator) -> Tensor:
    """Numbers of many magnitudes, in some blocks special ones."""
    made = normal((size,), torch.float64, numbers) * 10.0 ** torch.randint(-12, 4, (size,), generator=numbers)
    return torch.cat([made.to(dtype)[200:], values(size, dtype, numbers)[:200]])[:size]


@pytest.mark.parametrize("name", ENCODES)
def test_codes(device, name):
    source, *lost = kinds(name)
    numbers = generator(4)
    for size, offset in product((0, 1, 255, 256, 257, 5003), (0, 1, 8)):
        bucket = guarded(contents(source, size, numbers), offset)
        start = [normal((size,), dtype, numbers) * 0.01 for dtype in lost]
        found = []
        for backend in ("reference", "cuda"):
            codes = torch.full((size + offset + 3,), 99, dtype=torch.int8)
            units = guarded(torch.full((-(-size // 256),), 9.0), 1)
            kept = [guarded(one, offset) for one in start]
            device.warps, device.grid = 1 + size % 3, 1 + size % 2
            encode_int8(bucket.view, codes[offset : offset + size], units.view, 0.3, *(one.view for one in kept),
                        backend=backend)
            found.append([codes, units.storage, *(one.storage for one in kept)])
        for got, wanted in zip(found[1], found[0], strict=True):
            assert_same_bits(got, wanted, f"{size} elements, offset {offset}")
    assert {launched for launched, _ in device.launches} == {name}


def test_accesses_of_codes(device):
    """16 bytes, 8 for codes and 4 for units."""
    encode_int8(torch.ones(4096), torch.empty(4096, dtype=torch.int8), torch.empty(16), 1.0, torch.zeros(4096), "cuda")
    wide, single = device.counts["encode_F32_F32"]
    assert wide == 3 * 1024
    assert single == 4096 // 8 + 16


def test_codes_without_a_kernel(device):
    values, codes, units = torch.ones(300), torch.empty(300, dtype=torch.int8), torch.empty(2)
    encode_int8(values, codes, units, 1.0, torch.zeros(300, dtype=torch.bfloat16), "cuda")
    assert not device.launches
    assert codes.tolist() == [127] * 300


# --- Sums -------------------------------------------------------------------------------------------------------------

def check_sum(chunks, out, scale, what):
    """The bits of the sum and of its squares, with and without these."""
    wanted, copies = out.clone(), [chunk.clone() for chunk in chunks]
    right = sum_chunks(copies, wanted, scale, True, "reference")
    assert sum_chunks(chunks, out, scale, backend="cuda") is None
    assert_same_bits(out, wanted, what)
    out.fill_(5.0)
    measured = sum_chunks(chunks, out, scale, True, "cuda")
    assert_same_bits(out, wanted, f"{what}, measured")
    assert measured[0].shape == measured[1].shape == ()
    assert_same_bits(measured[0], norm.reference([wanted])[0][0], f"{what}, squares")
    assert_same_bits(measured[1], right[1], f"{what}, flag")


@pytest.mark.parametrize("name", SUMS)
def test_sums(device, name):
    source, target = kinds(name)
    numbers = generator(5)
    for size, offsets in product((0, 1, 15, 16, 513, 4095, 4099, 9001, 20_000), OFFSETS):
        ranks = (1, 2, 3, 8)[(size + offsets[0]) % 4]
        chunks = [guarded(values(size, source, numbers), offsets[rank % 2]) for rank in range(ranks)]
        out = guarded(torch.full((size,), 5.0, dtype=target), offsets[2])
        device.warps, device.grid = 1 + offsets[0] % 3, (None, 1, 3)[size % 3]
        check_sum([chunk.view for chunk in chunks], out.view, 1 / ranks, f"{size}, {ranks} ranks, {offsets}")
        assert all(one.untouched() for one in (out, *chunks)), "memory beside a tensor was written"


@pytest.mark.parametrize("name", ["sum_BF16_F32", "sum_F32_F32", "sum_F64_F64", "sum_BF16_BF16"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8, 9])
def test_every_number_of_ranks(device, name, ranks):
    source, target = kinds(name)
    chunks = [values(5000, source, generator(rank)) for rank in range(ranks)]
    check_sum(chunks, torch.empty(5000, dtype=target), 0.7, f"{ranks} ranks")


@pytest.mark.parametrize("name", [name for name in SUMS if len(set(kinds(name))) == 1])
def test_out_may_be_a_chunk(device, name):
    dtype, numbers = kinds(name)[0], generator(6)
    for rank in range(3):
        chunks = [values(5003, dtype, numbers) for _ in range(3)]
        wanted = torch.empty_like(chunks[0])
        sum_chunks(chunks, wanted, 0.3, backend="reference")
        sum_chunks(chunks, chunks[rank], 0.3, backend="cuda")
        assert_same_bits(chunks[rank], wanted, f"rank {rank}")


def test_zeros_keep_their_sign(device):
    zeros = torch.tensor([-0.0, 0.0, -0.0, 0.0]).repeat(300)
    for ranks in (1, 2, 3):
        chunks = [zeros, *[torch.tensor([-0.0, -0.0, 0.0, 0.0]).repeat(300)] * (ranks - 1)]
        for target in (torch.float32, torch.bfloat16):
            check_sum(chunks, torch.empty(1200, dtype=target), 1.0, f"{ranks} ranks")


@pytest.mark.parametrize("name", ["sum_F32_BF16", "sum_F32_F32", "sum_F16_F16", "sum_F64_F64"])
def test_one_number_that_is_not_finite_is_found(device, name):
    source, target = kinds(name)
    for value, place in product((math.inf, -math.inf, math.nan), (0, 1, 4095, 4096, 8999)):
        chunks = [torch.ones(9000, dtype=source) for _ in range(2)]
        out = torch.empty(9000, dtype=target)
        assert not sum_chunks(chunks, out, squares=True, backend="cuda")[1]
        chunks[1][place] = value
        assert sum_chunks(chunks, out, squares=True, backend="cuda")[1]
        assert sum_chunks([chunk[place : place + 1] for chunk in chunks], out[:1], squares=True, backend="cuda")[1]


def test_a_tree_of_several_levels(device):
    """More than 256 blocks of 4,096."""
    check_sum([normal((257 * 4096 + 5,), torch.bfloat16, generator(7))] * 2, torch.empty(257 * 4096 + 5), 0.5, "levels")


@pytest.mark.parametrize(("name", "ranks", "bytes_of_one"), [
    ("sum_BF16_F32", 2, 8), ("sum_BF16_F32", 5, 14), ("sum_F32_F32", 3, 16), ("sum_F64_F64", 2, 24)])
def test_accesses_of_sums_are_wide(device, name, ranks, bytes_of_one):
    source, target = kinds(name)
    chunks = [torch.ones(8192, dtype=source) for _ in range(ranks)]
    sum_chunks(chunks, torch.empty(8192, dtype=target), backend="cuda")
    assert device.counts[name] == (8192 * bytes_of_one // 16, 0)


def test_sums_without_a_kernel_and_tables(device):
    chunks = [normal((5000,), torch.float16, generator(rank)) for rank in range(2)]
    check_sum(chunks, torch.empty(5000, dtype=torch.bfloat16), 0.5, "another backend's")
    assert not device.launches
    out = torch.empty(5000)
    first = sum_chunks(chunks, out, 0.5, True, "cuda")
    chunks[0].fill_(0.0)
    second = sum_chunks(chunks, out, 0.5, True, "cuda")
    assert [launched for launched, _ in device.launches] == ["sum_F16_F32", "tree"] * 2
    assert len(device.uploads) == 1
    assert_same_bits(second[0], norm.squares([out])[0][0])
    assert first[0] != second[0], "results are their callers'"


@pytest.mark.parametrize("name", CODED)
def test_sums_of_codes(device, name):
    """Of any codes and units, those of broken blocks and negative and zero ones too."""
    target, numbers = kinds(name)[1], generator(8)
    for size, offset, ranks in product((0, 1, 16, 255, 256, 4099, 20_000), (0, 3, 16), (1, 2, 3, 8)):
        codes = [torch.randint(-128, 128, (size + offset,), generator=numbers).to(torch.int8)[offset:]
                 for _ in range(ranks)]
        units = [normal((-(-size // 256),), torch.float32, numbers) for _ in range(ranks)]
        for rank, unit in enumerate(units):
            unit[2 + rank : 3 + rank] = (math.nan, -0.0, 1e-38, 0.0)[rank % 4]
        out = guarded(torch.full((size,), 5.0, dtype=target), offset)
        wanted = torch.empty(size, dtype=target)
        device.warps, device.grid = 1 + ranks % 3, 1 + size % 2
        right = sum_int8(codes, units, wanted, 0.5, True, "reference")
        sum_int8(codes, units, out.view, 0.5, backend="cuda")
        assert_same_bits(out.view, wanted, f"{size}, offset {offset}, {ranks} ranks")
        measured = sum_int8(codes, units, out.view, 0.5, True, "cuda")
        assert_same_bits(out.view, wanted)
        for got, one in zip(measured, right, strict=True):
            assert_same_bits(got, one, f"{size}, offset {offset}, {ranks} ranks")
        assert out.untouched()


def test_no_memory(device):
    """Said, with a remedy, before anything is written."""
    slots, out = Slots(torch.zeros(100), [torch.ones(100)], [0], backend="cuda"), torch.zeros(100)
    device.room = 8
    with pytest.raises(torch.OutOfMemoryError, match=r"no memory left for the table of a bucket.*empty_cache"):
        slots.pack(0, torch.ones(100))
    with pytest.raises(torch.OutOfMemoryError, match="no memory left for the workspace of a sum"):
        sum_chunks([torch.ones(100)], out, squares=True, backend="cuda")
    assert not slots.bucket.any()
    assert not out.any()
    assert not device.launches
