"""Norms, stages with sums and Adafactor on a real GPU, against the CPU. Needs torch, triton, numpy and pytest only."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import REALS, assert_same_bits, generator, needs_native, normal
from test_cuda_sums import COMBINATIONS, NAMES, items_of
from test_gpu_step import GPU, compare, on_gpu

from fasttrain.kernels import cuda, dispatch, native, norm, stages
from fasttrain.optim import LAMB, LARS, Adafactor, StableAdamW

pytestmark = [pytest.mark.gpu, needs_native]
SIZES = (0, 1, 17, 4095, 4096, 4097, 8193, 140_001, 3_000_000)


@pytest.fixture(params=("cuda", "triton"))
def backend(request):
    if request.param == "cuda" and not cuda.IMAGE.is_file():
        pytest.skip(f"no device code in this build: {native.build_info()['cuda_reason']}")
    assert dispatch.load(request.param).why_not(GPU) is None
    return request.param


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_norm(backend, dtype):
    """Bits of sums, flag and total; aligned and not; the same again, and for one tensor alone."""
    numbers = generator(1)
    for offset in (0, 1, 3):
        here = [normal((size + offset,), dtype, numbers)[offset:] for size in SIZES]
        there = [torch.cat([tensor.new_zeros(offset), tensor]).to(GPU)[offset:] for tensor in here]
        wanted, _ = norm.squares(here)
        for _ in range(2):
            sums, flag = norm.squares(there, backend)
            assert_same_bits(sums, wanted, f"offset {offset}")
            assert not flag
            assert_same_bits(norm.total(sums, backend), norm.total(wanted))
        assert_same_bits(norm.squares(there[-1:], backend)[0], wanted[-1:])
        for value in (math.inf, -math.inf, math.nan):
            there[7][139_999] = value
            assert norm.squares(there, backend)[1]


@pytest.mark.parametrize(("rule", "dtypes"), COMBINATIONS, ids=NAMES)
def test_stages(backend, rule, dtypes):
    numbers = generator(2)
    for offsets in ((0, 0, 0), (1, 1, 1), (1, 0, 2)):
        items, _ = items_of(rule, dtypes, offsets, numbers, (0, 1, 600, 4099, 9001, 300_003))
        moved = [on_gpu(item) for item in items]
        wanted, sums = stages.run(items, "reference"), stages.run(moved, backend)
        compare(moved, items, f"offsets {offsets}")
        assert_same_bits(torch.from_numpy(sums), torch.from_numpy(wanted))


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("make", [LAMB, LARS, StableAdamW], ids=lambda make: make.__name__)
def test_optimizers_of_two_stages(backend, make, dtype):
    """Whole optimizers: as on the CPU, to the bit."""
    values = [normal(shape, dtype, generator(3)) for shape in ((5000,), (300, 70), (), (0,), (64, 65))]
    ends = []
    for device, name in ((GPU, backend), (torch.device("cpu"), "cpu")):
        params = [torch.nn.Parameter(value.to(device)) for value in values]
        optimizer, numbers = make(params, lr=0.1, backend=name), generator(4)
        for _ in range(3):
            for p in params:
                p.grad = normal(p.shape, dtype, numbers).to(device)
            optimizer.step()
        ends.append([p.detach().cpu() for p in params])
    for got, wanted in zip(*ends, strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_adafactor(backend, dtype):
    """Within a few units in the last place of the CPU after three steps: sums are made in another order. Twice the same
    bits; nothing synchronises.
    """
    shapes = ((5000,), (300, 70), (), (0,), (64, 256), (4, 65, 130), (1000, 1000))
    values, ends = [normal(shape, dtype, generator(5)) for shape in shapes], []
    for device, name in ((GPU, backend), (GPU, backend), (torch.device("cpu"), "cpu")):
        params = [torch.nn.Parameter(value.to(device)) for value in values]
        optimizer, numbers = Adafactor(params, lr=0.1, backend=name), generator(6)
        for step in range(3):
            for p in params:
                p.grad = normal(p.shape, dtype, numbers).to(device)
            torch.cuda.set_sync_debug_mode("error" if step and device == GPU else "default")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        ends.append([p.detach().cpu() for p in params])
    close = 64 * torch.finfo(dtype).eps
    for first, again, wanted in zip(*ends, strict=True):
        assert_same_bits(first, again)
        assert bool(((first.double() - wanted.double()).abs() <= close * wanted.double().abs().clamp_min(1)).all())


def test_nothing_waits():
    """A norm and a stage are queued behind other work."""
    if not cuda.IMAGE.is_file():
        pytest.skip(f"no device code in this build: {native.build_info()['cuda_reason']}")
    tensors = [torch.ones(10_000, device=GPU)]
    for _ in range(2):
        norm.squares(tensors, "cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    sums, flag = norm.squares(tensors, "cuda")
    done = torch.cuda.Event()
    done.record()
    assert not done.query()
    assert sums.item() == 10_000
    assert not flag
