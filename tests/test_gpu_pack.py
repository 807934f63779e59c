"""Buckets on a real GPU against the CPU reference, bit for bit; the host does not wait."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from helpers import LAYOUTS, REALS, assert_same_bits, generator, make, needs_native, normal, specials
from torch import Tensor

from fasttrain.kernels import cuda, dispatch, native, norm
from fasttrain.kernels.chunks import encode_int8, sum_chunks, sum_int8
from fasttrain.kernels.pack import Slots

pytestmark = [pytest.mark.gpu, needs_native]
GPU = torch.device("cuda", 0)


@pytest.fixture(params=("cuda", "triton"))
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not cuda.IMAGE.is_file():
        pytest.skip(f"no device code in this build: {native.build_info()['cuda_reason']}")
    assert dispatch.load(request.param).why_not(GPU) is None
    return request.param


def numbers_of(size: int, dtype: torch.dtype, numbers: torch.Generator) -> Tensor:
    made = normal((size,), dtype, numbers)
    special = torch.tensor(specials(dtype), dtype=torch.float64).to(dtype)
    if size > 1000:
        made[100 : 100 + len(special)] = special
    return made


@pytest.mark.parametrize("source, target", list(product(REALS, REALS)), ids=str)
def test_pack_and_unpack(backend: str, source: torch.dtype, target: torch.dtype) -> None:
    numbers = generator(1)
    tensors = [make(layout, lambda size: normal(size, source, numbers)).view for layout in LAYOUTS]
    tensors += [numbers_of(size, source, numbers) for size in (1023, 1024, 1025, 300_001)]
    offsets, room = [], 1
    for tensor in tensors:
        offsets.append(room)
        room += tensor.numel() + 5
    found = []
    for device, name in ((torch.device("cpu"), "reference"), (GPU, backend)):
        bucket, residual = torch.zeros(room, dtype=target, device=device), torch.full((room,), 0.01, device=device)
        plain = torch.zeros(room, dtype=target, device=device)
        given = [tensor.to(device) for tensor in tensors]
        Slots(bucket, given, offsets, residual, name).pack_all(given, 1 / 3)
        slots = Slots(plain, given, offsets, None, name)
        for index in range(len(given)):
            slots.pack(index, given[index], 0.7)
        back = [torch.zeros_like(tensor) for tensor in given]
        Slots(bucket, given, offsets, None, name).unpack_all(back, 3.0)
        found.append([bucket, residual, plain, *back])
    for got, wanted in zip(found[1], found[0], strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("source, target", list(product(REALS, REALS)), ids=str)
def test_sums(backend: str, source: torch.dtype, target: torch.dtype) -> None:
    numbers = generator(2)
    for size, ranks, offset in product((0, 1, 1024, 300_001), (1, 2, 4, 7), (0, 3)):
        chunks = torch.stack([numbers_of(size, source, numbers) for _ in range(ranks)])
        there = [torch.cat([chunk[:0].new_zeros(offset), chunk]).to(GPU)[offset:] for chunk in chunks]
        out, wanted = torch.zeros(size + offset, dtype=target, device=GPU)[offset:], torch.zeros(size, dtype=target)
        sum_chunks(there, out, 1 / ranks, backend=backend)
        sum_chunks(chunks, wanted, 1 / ranks, backend="reference")
        assert_same_bits(out, wanted, f"{size} elements, {ranks} ranks, offset {offset}")


def test_squares(backend: str) -> None:
    """To the bits of the CPU; Triton's are those of another order."""
    for size in (1, 4097, 300_001, 3_000_000):
        chunks = normal((2, size), torch.float32, generator(3))
        out = torch.zeros(size, dtype=torch.bfloat16, device=GPU)
        sums, nonfinite = sum_chunks(chunks.to(GPU), out, squares=True, backend=backend)
        wanted = norm.squares([out.cpu()])[0][0]
        assert sums.device == nonfinite.device == out.device
        if backend == "cuda":
            assert_same_bits(sums, wanted)
        assert abs(sums.item() - wanted) <= 2**-40 * wanted  # another order of at most 2^22 positive numbers
        assert not nonfinite
        again = sum_chunks(chunks.to(GPU), out, squares=True, backend=backend)
        assert sums.item() == again[0].item()
        chunks[1, size - 1] = torch.inf
        assert sum_chunks(chunks.to(GPU), out, squares=True, backend=backend)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codes(backend: str, dtype: torch.dtype) -> None:
    numbers = generator(4)
    values, start = numbers_of(300_001, dtype, numbers), normal((300_001,), torch.float32, numbers) * 0.01
    found = []
    for device, name in ((torch.device("cpu"), "reference"), (GPU, backend)):
        codes, units = torch.zeros(300_001, dtype=torch.int8, device=device), torch.zeros(1172, device=device)
        residual, out = start.to(device, copy=True), torch.zeros(300_001, dtype=dtype, device=device)
        encode_int8(values.to(device), codes, units, 0.5, residual, name)
        sum_int8([codes] * 3, [units] * 3, out, 0.25, backend=name)
        found.append((codes, units, residual, out))
    for what, got, wanted in zip(("codes", "units", "residual", "sum"), found[1], found[0], strict=True):
        assert_same_bits(got, wanted, what)


def test_every_code(backend: str) -> None:
    """Each magnitude around the steps between codes: the GPU's root is an estimate."""
    steps = (torch.arange(0, 128, dtype=torch.float64) - 0.5).square()
    near = torch.cat([(steps * (1 + k * 2.0**-24)).float() for k in range(-8, 9)])
    for biggest in (16129.0, 3.0, 1e-30, 2.0**-130, 3e38):
        parts = (near[at : at + 255] * (biggest / 16129) for at in range(0, len(near), 255))
        values, found = torch.cat([torch.cat([part, torch.tensor([biggest])]) for part in parts]), []
        for device, name in ((torch.device("cpu"), "reference"), (GPU, backend)):
            codes = torch.zeros(len(values), dtype=torch.int8, device=device)
            units = torch.zeros(-(-len(values) // 256), device=device)
            encode_int8(values.to(device), codes, units, backend=name)
            found.append((codes, units))
        for what, got, wanted in zip(("codes", "units"), found[1], found[0], strict=True):
            assert_same_bits(got, wanted, f"{what}, {biggest}")


def test_a_captured_pack_and_sum(backend: str) -> None:
    """Replayed in a CUDA graph, with other numbers: what eager calls give."""
    if backend != "cuda":
        pytest.skip("it sends a table on each call")
    gradients = [torch.randn(size, device=GPU) for size in (10, 5000)]
    slots = Slots(torch.zeros(5010, dtype=torch.bfloat16, device=GPU), gradients, [0, 10], backend=backend)
    out = torch.zeros(5010, device=GPU)

    def whole() -> tuple[Tensor, Tensor]:
        slots.pack(0, gradients[0], 0.5)
        slots.pack(1, gradients[1], 0.5)
        measured = sum_chunks([slots.bucket, slots.bucket], out, 0.5, True, backend)
        assert measured is not None
        return measured

    stream = torch.cuda.Stream(GPU)  # tables are kept by stream
    with torch.cuda.stream(stream):
        whole()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            squares = whole()[0]
        for gradient in gradients:
            gradient.normal_()
        graph.replay()
        replayed = [out.clone(), squares.clone()]
        eager = whole()[0]
    torch.cuda.synchronize()
    assert_same_bits(replayed[0], out)
    assert_same_bits(replayed[1], eager)


def test_the_host_does_not_wait(backend: str) -> None:
    gradients = [torch.randn(size, device=GPU) for size in (10, 5000)]
    slots = Slots(torch.zeros(5010, dtype=torch.bfloat16, device=GPU), gradients, [0, 10],
                  backend=backend)
    out = torch.zeros(5010, device=GPU)

    def whole() -> None:
        slots.pack_all(gradients, 0.5)
        slots.pack(1, gradients[1], 0.5)
        sum_chunks([slots.bucket, slots.bucket], out, 0.5, True, backend)
        slots.unpack_all(gradients)

    whole()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        whole()
    finally:
        torch.cuda.set_sync_debug_mode("default")
