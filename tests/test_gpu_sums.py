"""Norms, stages with sums and Adafactor on a real GPU, against the CPU. Needs torch, triton, numpy and pytest only."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import REALS, assert_same_bits, generator, normal
from torch.nn import Parameter

from fasttrain.kernels import dispatch, norm
from fasttrain.optim import LAMB, LARS, Adafactor, StableAdamW

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
SIZES = (0, 1, 17, 4096, 65_536, 65_537, 400_003, 8 * 65_536)


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := dispatch.load(request.param).why_not(GPU):
        pytest.skip(reason)
    return request.param


def on_gpu(tensor: torch.Tensor, past: int) -> torch.Tensor:
    """On the GPU, `past` elements behind a multiple of 16 bytes."""
    storage = torch.zeros(past + tensor.numel(), dtype=tensor.dtype, device=GPU)
    storage[past:].copy_(tensor.flatten())
    return storage[past:].view(tensor.shape)


def test_norms(backend):
    """The bits of the eager tree, aligned and misaligned, all storages in one call; the flag from any element."""
    numbers = generator(1)
    for past in (0, 1):
        here = [normal((size,), dtype, numbers) for size in SIZES for dtype in REALS]
        there = [on_gpu(tensor, past) for tensor in here]
        for value in (0.5, math.nan, math.inf):
            for index in (4, len(here) - 1, len(here) - 4):
                old = here[index][-1].clone()
                here[index][-1] = there[index][-1] = value
                sums, nonfinite = norm.squares(there, backend)
                wanted, flag = norm.reference(here)
                assert_same_bits(sums.cpu(), wanted, f"{past} {value} {index}")
                assert bool(nonfinite) == bool(flag)
                here[index][-1] = there[index][-1] = old
        sums = norm.squares(there, backend)[0]
        assert_same_bits(norm.total(sums, backend).cpu(), norm.tree(sums.cpu()))


def test_a_norm_does_not_wait(backend):
    tensors = [on_gpu(normal((size,), torch.float32, generator(2)), 0) for size in SIZES]
    norm.total(norm.squares(tensors, backend)[0], backend)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm.total(norm.squares(tensors, backend)[0], backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer", [LAMB, LARS, StableAdamW])
def test_two_stages(optimizer, backend):
    """The bits of the CPU, in 2 n + 1 launches for n combinations of storages, and one wait."""
    numbers = generator(3)
    shapes = [(size,) for size in SIZES] + [(70, 90), ()]
    here = [Parameter(normal(shape, dtype, numbers)) for dtype in REALS for shape in shapes]
    there = [Parameter(on_gpu(p.detach(), i % 2)) for i, p in enumerate(here)]
    ours, wanted = optimizer(there, lr=0.1, backend=backend), optimizer(here, lr=0.1)
    for _ in range(3):
        for p, q in zip(here, there, strict=True):
            p.grad = normal(p.shape, p.dtype, numbers)
            q.grad = p.grad.to(GPU)
        wanted.step()
        ours.step()
        if backend == "triton":
            assert (ours.last_step.launches, ours.last_step.host_syncs) == (2 * len(REALS) + 1, 1)
        for index, (p, q) in enumerate(zip(here, there, strict=True)):
            assert_same_bits(q.cpu(), p, f"parameter {index}")
            for key, value in wanted.state[p].items():
                assert_same_bits(ours.state[q][key].cpu(), value, f"parameter {index} {key}")


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_adafactor(dtype, backend):
    """To what another order of sums and the roundings of factors leave: units in the last place of p or its update."""
    numbers = generator(4)
    shapes = ((512, 1024), (300, 770), (3, 65, 257), (2, 3, 4, 5), (1, 9), (100_003,), (0, 4), (), (5000, 8))
    here = [Parameter(normal(shape, dtype, numbers)) for shape in shapes]
    there = [Parameter(on_gpu(p.detach(), i == 1)) for i, p in enumerate(here)]
    ours, wanted = Adafactor(there, lr=0.1, backend=backend), Adafactor(here, lr=0.1, backend="reference")
    for _ in range(2):
        for p, q in zip(here, there, strict=True):
            p.grad = normal(p.shape, dtype, numbers)
            q.grad = p.grad.to(GPU)
        wanted.step()
        ours.step()
        for index, (p, q) in enumerate(zip(here, there, strict=True)):
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
        params = [Parameter(on_gpu(normal(shape, torch.float32, numbers), 0)) for shape in shapes]
        optimizers = [Adafactor(group, backend=backend) for group in ([[p] for p in params] if alone else [params])]
        for p in params:
            p.grad = normal(p.shape, torch.float32, numbers).to(GPU)
        for optimizer in optimizers:
            optimizer.step()
        ends.append([p.detach().cpu() for p in params])
    for other in ends[1:]:
        for a, b in zip(other, ends[0], strict=True):
            assert_same_bits(a, b)
