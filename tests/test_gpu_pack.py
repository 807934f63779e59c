"""Buckets on a real GPU against the CPU reference, bit for bit; the host does not wait."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from helpers import LAYOUTS, REALS, assert_same_bits, generator, make, normal, specials
from torch import Tensor

from fasttrain.kernels import norm
from fasttrain.kernels.chunks import encode_int8, sum_chunks, sum_int8
from fasttrain.kernels.pack import Slots

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


def numbers_of(size: int, dtype: torch.dtype, numbers: torch.Generator) -> Tensor:
    made = normal((size,), dtype, numbers)
    special = torch.tensor(specials(dtype), dtype=torch.float64).to(dtype)
    if size > 1000:
        made[100 : 100 + len(special)] = special
    return made


@pytest.mark.parametrize("source, target", list(product(REALS, REALS)), ids=str)
def test_pack_and_unpack(source: torch.dtype, target: torch.dtype) -> None:
    numbers = generator(1)
    tensors = [make(layout, lambda size: normal(size, source, numbers)).view for layout in LAYOUTS]
    tensors += [numbers_of(size, source, numbers) for size in (1023, 1024, 1025, 300_001)]
    offsets, room = [], 1
    for tensor in tensors:
        offsets.append(room)
        room += tensor.numel() + 5
    found = []
    for device, backend in ((torch.device("cpu"), "reference"), (GPU, "triton")):
        bucket, residual = torch.zeros(room, dtype=target, device=device), torch.full((room,), 0.01, device=device)
        given = [tensor.to(device) for tensor in tensors]
        Slots(bucket, given, offsets, residual, backend).pack_all(given, 1 / 3)
        back = [torch.zeros_like(tensor) for tensor in given]
        Slots(bucket, given, offsets, None, backend).unpack_all(back, 3.0)
        found.append([bucket, residual, *back])
    for got, wanted in zip(found[1], found[0], strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("source, target", list(product(REALS, REALS)), ids=str)
def test_sums(source: torch.dtype, target: torch.dtype) -> None:
    numbers = generator(2)
    for size, ranks in product((0, 1, 1024, 300_001), (1, 2, 4, 7)):
        chunks = torch.stack([numbers_of(size, source, numbers) for _ in range(ranks)])
        out, wanted = torch.zeros(size, dtype=target, device=GPU), torch.zeros(size, dtype=target)
        sum_chunks(chunks.to(GPU), out, 1 / ranks)
        sum_chunks(chunks, wanted, 1 / ranks, backend="reference")
        assert_same_bits(out, wanted, f"{size} elements, {ranks} ranks")


def test_squares() -> None:
    chunks = normal((2, 300_001), torch.float32, generator(3))
    out = torch.zeros(300_001, dtype=torch.bfloat16, device=GPU)
    sums, nonfinite = sum_chunks(chunks.to(GPU), out, squares=True)
    wanted = norm.squares([out.cpu()])[0][0].item()
    assert sums.device == nonfinite.device == out.device
    assert abs(sums.item() - wanted) <= 2**-40 * wanted  # another order of at most 2^19 positive numbers
    assert not nonfinite
    again = sum_chunks(chunks.to(GPU), out, squares=True)
    assert sums.item() == again[0].item()
    chunks[1, 300_000] = torch.inf
    assert sum_chunks(chunks.to(GPU), out, squares=True)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codes(dtype: torch.dtype) -> None:
    numbers = generator(4)
    values, start = numbers_of(300_001, dtype, numbers), normal((300_001,), torch.float32, numbers) * 0.01
    found = []
    for device, backend in ((torch.device("cpu"), "reference"), (GPU, "triton")):
        codes, units = torch.zeros(300_001, dtype=torch.int8, device=device), torch.zeros(1172, device=device)
        residual, out = start.to(device, copy=True), torch.zeros(300_001, dtype=dtype, device=device)
        encode_int8(values.to(device), codes, units, 0.5, residual, backend)
        sum_int8([codes] * 3, [units] * 3, out, 0.25, backend=backend)
        found.append((codes, units, residual, out))
    for name, got, wanted in zip(("codes", "units", "residual", "sum"), found[1], found[0], strict=True):
        assert_same_bits(got, wanted, name)


def test_the_host_does_not_wait() -> None:
    gradients = [torch.randn(size, device=GPU) for size in (10, 5000)]
    slots = Slots(torch.zeros(5010, dtype=torch.bfloat16, device=GPU), gradients, [0, 10])
    out = torch.zeros(5010, device=GPU)

    def whole() -> None:
        slots.pack_all(gradients, 0.5)
        slots.pack(1, gradients[1], 0.5)
        sum_chunks([slots.bucket, slots.bucket], out, 0.5, squares=True)
        slots.unpack_all(gradients)

    whole()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        whole()
    finally:
        torch.cuda.set_sync_debug_mode("default")
