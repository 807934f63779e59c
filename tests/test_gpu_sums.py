"""Norms, stages with sums and Adafactor on a real GPU, in CUDA and in Triton, against the CPU."""

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
SIZES = (0, 1, 17, 4095, 4096, 4097, 8193, 65_537, 140_001, 8 * 65_536, 3_000_000)


@pytest.fixture(params=("cuda", "triton"))
def backend(request):
    if request.param == "cuda" and not cuda.IMAGE.is_file():
        pytest.skip(f"no device code in this build: {native.build_info()['cuda_reason']}")
    assert dispatch.load(request.param).why_not(GPU) is None
    return request.param


def there(tensor: torch.Tensor, past: int) -> torch.Tensor:
    """On the GPU, `past` elements behind a multiple of 16 bytes."""
    storage = torch.zeros(past + tensor.numel(), dtype=tensor.dtype, device=GPU)
    storage[past:].copy_(tensor.flatten())
    return storage[past:].view(tensor.shape)


def test_norms(backend):
    """The bits of the eager tree, aligned and misaligned, all storages in one call; the flag from any element; the same
    again, and for one tensor alone.
    """
    numbers = generator(1)
    for past in (0, 1, 3):
        here = [normal((size,), dtype, numbers) for size in SIZES for dtype in REALS]
        moved = [there(tensor, past) for tensor in here]
        for value in (0.5, math.nan, math.inf, -math.inf):
            for index in (4, len(here) - 1, len(here) - 4):
                old = here[index][-1].clone()
                here[index][-1] = moved[index][-1] = value
                wanted, flag = norm.reference(here)
                for _ in range(2):
                    sums, nonfinite = norm.squares(moved, backend)
                    assert_same_bits(sums.cpu(), wanted, f"{past} {value} {index}")
                    assert bool(nonfinite) == bool(flag)
                here[index][-1] = moved[index][-1] = old
        sums = norm.squares(moved, backend)[0]
        assert_same_bits(norm.total(sums, backend).cpu(), norm.tree(sums.cpu()))
        assert_same_bits(norm.squares(moved[-1:], backend)[0].cpu(), sums[-1:].cpu())


def test_nothing_waits(backend):
    """A norm is queued behind other work."""
    tensors = [torch.ones(10_000, device=GPU)]
    for _ in range(2):
        norm.total(norm.squares(tensors, backend)[0], backend)  # compiles
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums, flag = norm.squares(tensors, backend)
        total = norm.total(sums, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    done = torch.cuda.Event()
    done.record()
    assert not done.query()
    assert total.item() == 10_000
    assert not flag


@pytest.mark.parametrize(("rule", "dtypes"), COMBINATIONS, ids=NAMES)
def test_stages(backend, rule, dtypes):
    numbers = generator(2)
    for offsets in ((0, 0, 0), (1, 1, 1), (1, 0, 2)):
        items, _ = items_of(rule, dtypes, offsets, numbers, (0, 1, 600, 4099, 9001, 300_003))
        moved = [on_gpu(item) for item in items]
        wanted, sums = stages.run(items, "reference"), stages.run(moved, backend)
        compare(moved, items, f"offsets {offsets}")
        assert_same_bits(torch.from_numpy(sums), torch.from_numpy(wanted))


@pytest.mark.parametrize("optimizer", [LAMB, LARS, StableAdamW])
def test_two_stages(optimizer, backend):
    """Whole optimizers, all dtypes at once: the bits of the CPU; 2 n + 1 launches for n combinations of storages."""
    numbers = generator(3)
    shapes = [(size,) for size in SIZES] + [(300, 70), (64, 65), ()]
    here = [torch.nn.Parameter(normal(shape, dtype, numbers)) for dtype in REALS for shape in shapes]
    moved = [torch.nn.Parameter(there(p.detach(), i % 2)) for i, p in enumerate(here)]
    ours, wanted = optimizer(moved, lr=0.1, backend=backend), optimizer(here, lr=0.1)
    for _ in range(3):
        for p, q in zip(here, moved, strict=True):
            p.grad = normal(p.shape, p.dtype, numbers)
            q.grad = p.grad.to(GPU)
        wanted.step()
        ours.step()
        if backend == "triton":
            assert (ours.last_step.launches, ours.last_step.host_syncs) == (2 * len(REALS) + 1, 1)
        for index, (p, q) in enumerate(zip(here, moved, strict=True)):
            assert_same_bits(q.cpu(), p, f"parameter {index}")
            for key, value in wanted.state[p].items():
                assert_same_bits(ours.state[q][key].cpu(), value, f"parameter {index} {key}")


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_adafactor(dtype, backend):
    """To what another order of sums and the roundings of factors leave: units in the last place of p or its update.
    Nothing waits for the device.
    """
    numbers = generator(4)
    shapes = ((512, 1024), (300, 770), (3, 65, 257), (2, 3, 4, 5), (1, 9), (100_003,), (0, 4), (), (5000, 8))
    here = [torch.nn.Parameter(normal(shape, dtype, numbers)) for shape in shapes]
    moved = [torch.nn.Parameter(there(p.detach(), i == 1)) for i, p in enumerate(here)]
    ours, wanted = Adafactor(moved, lr=0.1, backend=backend), Adafactor(here, lr=0.1, backend="reference")
    for step in range(2):
        for p, q in zip(here, moved, strict=True):
            p.grad = normal(p.shape, dtype, numbers)
            q.grad = p.grad.to(GPU)
        wanted.step()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            ours.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for index, (p, q) in enumerate(zip(here, moved, strict=True)):
            pairs = [(q, p, 1.0)] + [(ours.state[q][key], value, 1e-30) for key, value in wanted.state[p].items()]
            for got, right, least in pairs:
                exact = right.detach().double()
                off = (got.detach().cpu().double() - exact).abs() / exact.abs().clamp_min(least)
                assert bool((off <= 8 * torch.finfo(dtype).eps).all()), f"parameter {index} {tuple(p.shape)}"
    if backend == "triton":
        assert (ours.last_step.launches, ours.last_step.host_syncs) == (8, 0)


def test_adafactor_repeats_itself(backend):
    """The same bits twice, and alone as among others."""
    ends = []
    for alone in (False, False, True):
        numbers = generator(5)
        shapes = ((700, 900), (64, 256), (999,))
        params = [torch.nn.Parameter(there(normal(shape, torch.float32, numbers), 0)) for shape in shapes]
        optimizers = [Adafactor(group, backend=backend) for group in ([[p] for p in params] if alone else [params])]
        for p in params:
            p.grad = normal(p.shape, torch.float32, numbers).to(GPU)
        for optimizer in optimizers:
            optimizer.step()
        ends.append([p.detach().cpu() for p in params])
    for other in ends[1:]:
        for a, b in zip(other, ends[0], strict=True):
            assert_same_bits(a, b)
