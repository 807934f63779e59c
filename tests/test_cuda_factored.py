"""Adafactor's CUDA kernels, walked on the host (tests/cuda_host.py), against the reference and the compiled passes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import cuda_host
import pytest
import torch
from helpers import REALS, assert_same_bits, generator, needs_native, normal, ulp
from test_cuda_walk import guarded

from fasttrain.kernels import cuda, cuda_factored, factored
from fasttrain.kernels.item import Item
from fasttrain.optim import Adafactor, Lion

pytestmark = needs_native

SHAPES = ((7,), (), (0,), (5, 3), (65, 40), (3, 2100), (64, 256), (66, 257), (3, 5, 7, 4), (1, 9), (9, 1), (4100,),
          (2, 1, 1), (40, 64, 128), (131_200,))
ROW = (0.5, 0.99, 0.3, 0.02, 1e-6, 1e-3, 1.0)
CLIPPED = (-3.0, 1.0, 0.2, 0.5, 0.0, 1e-2, 1.25)


@pytest.fixture
def device(monkeypatch):
    return cuda_host.install(monkeypatch)


def work_of(shape, dtype, numbers, row=ROW, offset=0) -> tuple[factored.Work, list[Any]]:
    """An item in guarded memory, `offset` elements after a multiple of 64 bytes."""
    shapes = [shape, shape, *([(*shape[:-1], 1), (*shape[:-2], 1, shape[-1])] if len(shape) > 1 else [shape])]
    values = [normal(one, torch.float64, numbers) for one in shapes]
    values[2:] = [value.square() + 0.01 for value in values[2:]]
    made = [guarded(value.to(dtype).reshape(-1), offset) for value in values]
    tensors = tuple(one.view.view(size) for one, size in zip(made, shapes, strict=True))
    return (Item(f"{shape}", Lion.rules[0], tensors, (), torch.tensor(3.0)), row), made


def copies(works, dtype=None):
    return [(Item(item.name, item.rule, tuple(tensor.clone() if dtype is None else tensor.to(dtype, copy=True)
                                              for tensor in item.tensors), (), None), row) for item, row in works]


def check(works, what=""):
    """One step against the reference: in float64, and in the types of the items.

    In float64 within 1e-12 of the numbers that are added. Else states within half a unit, beside what the order of sums
    in float64 may tip (0.51), and p within what its seven operations in float32 round (tests/test_adafactor.py).
    """
    exact_works = copies(works, torch.float64)
    factored.step_reference(exact_works)
    before = [item.tensors[0].clone() for item, _ in works]
    counts = [item.counter.item() for item, _ in works]
    cuda_factored.step(works)
    for (item, _), (exact, _), old, count in zip(works, exact_works, before, counts, strict=True):
        assert item.counter.item() == count + 1
        for index, (got, right) in enumerate(zip(item.tensors, exact.tensors, strict=True)):
            if got.numel() == 0:
                continue
            where = f"{what}, {item.name}, operand {index}, {got.dtype}"
            if got.dtype == torch.float64:
                assert bool(((got - right).abs() <= 1e-12 * right.abs().clamp_min(1 if index == 0 else 0)).all()), where
                continue
            size = right.abs()
            if index == 0:
                size = torch.maximum(torch.maximum(size, old.double().abs()), (right - old.double()).abs())
            wide = 6.0 if index == 0 else 3.5 if len(item.tensors) == 3 else 0.51
            bound = wide if got.dtype == torch.float32 else 0.52
            off = ((got.double() - right).abs() / ulp(size, got.dtype)).max().item()
            assert off <= bound, f"{where}: {off:.2f} ulp"


@pytest.mark.parametrize("row", [ROW, CLIPPED], ids=["plain", "clipped"])
@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_shapes(device, dtype, row):
    """Vectors, matrices and batches of them; six launches whatever the number of parameters."""
    numbers = generator(1)
    for offset in (0, 1, 16 // dtype.itemsize):
        pairs = [work_of(shape, dtype, numbers, row, offset) for shape in SHAPES]
        device.launches.clear()
        check([work for work, _ in pairs], f"offset {offset}")
        assert all(one.untouched() for _, made in pairs for one in made), "memory beside a tensor was written"
        kinds = [name.removesuffix(f"_{cuda.NAMES[dtype]}") for name, _ in device.launches]
        assert kinds == ["factored_rows", "factored_lines", "tree", "factored_update", "tree", "factored_apply"]


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_neighbours_and_the_grid_do_not_matter(device, dtype):
    """The same bits alone, and with other grids."""
    together = [work_of(shape, dtype, generator(2), offset=1)[0] for shape in SHAPES]
    alone, other = copies(together), copies(together)
    check(together)
    for work in alone:
        cuda_factored.step([work])
    device.grid, device.warps = 3, 2
    cuda_factored.step(other)
    for found in (alone, other):
        for (item, _), (right, _) in zip(found, together, strict=True):
            for got, wanted in zip(item.tensors, right.tensors, strict=True):
                assert_same_bits(got, wanted, item.name)


def test_aligned_accesses_are_wide(device):
    """Of a matrix of whole tiles, one by one only states, their parts and what the numbers of a tile are made of."""
    work, _ = work_of((64, 256), torch.float32, generator(3))
    check([work])
    packs = 64 * 256 // 4
    assert device.counts["factored_rows_F32"] == (packs, 2 * 64 + 256)  # row sums of two tiles, column sums
    wide, _ = device.counts["factored_apply_F32"]
    assert wide == 3 * packs + 2  # p, g, p again; the parameter's sums for each tile


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, 1e-45])
@pytest.mark.parametrize("shape", [(33, 70), (300,)], ids=str)
def test_special_values(device, shape, value):
    """One element of the gradient, or all of them: NaN where the compiled passes have NaN. (Both round each factor to
    float32, which may overflow; the reference only their product.)
    """
    for all_of_them in (False, True):
        work, _ = work_of(shape, torch.float32, generator(4))
        work[0].tensors[1].view(-1)[slice(None) if all_of_them else slice(37, 38)] = value
        wanted = copies([work])
        factored.step_native(wanted)
        cuda_factored.step([work])
        for got, right in zip(work[0].tensors, wanted[0][0].tensors, strict=True):
            assert torch.equal(got.isnan(), right.isnan())
            assert bool(torch.isclose(got, right, rtol=1e-5, atol=1e-6, equal_nan=True).all())


def test_dtypes_together_and_what_goes_elsewhere(device):
    """One launch more for each dtype; a gradient of another dtype goes to the reference; tables stay."""
    numbers = generator(5)
    works = [work_of(shape, dtype, numbers)[0] for dtype in REALS for shape in ((40, 30), (9,))]
    mixed = Item("mixed", Lion.rules[0], (torch.ones(3, 4), torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(3, 1),
                                          torch.ones(1, 4)), (), torch.tensor(3.0))
    check([*works, (mixed, ROW)])
    assert len(device.launches) == 4 * 4 + 2
    check(works)
    assert len(device.uploads) == 1, "tables and numbers; then nothing, since nothing changed"
    works = [(replace(item, tensors=(item.tensors[0], item.tensors[1].clone(), *item.tensors[2:])), row)
             for item, row in works]
    check(works)
    assert len(device.uploads) == 2
    assert device.uploads[1] < device.uploads[0] / 3, "addresses of gradients"


def test_whole_optimizer(device, monkeypatch):
    """Layouts and shared memory as the base has them; close to the compiled passes after several steps."""
    monkeypatch.setattr(cuda, "why_not", lambda device: None)
    values = [normal(shape, torch.float64, generator(6)) for shape in ((30, 20), (7,), (2, 3, 4), (20, 30))]
    ends = []
    for backend in ("cuda", "cpu"):
        params = [torch.nn.Parameter(value.clone()) for value in values[:3]]
        params.append(torch.nn.Parameter(values[3].clone().t()))
        optimizer, numbers = Adafactor(params, lr=0.1, weight_decay=0.1, backend=backend), generator(7)
        for _ in range(3):
            for p in params:
                p.grad = normal(p.shape, torch.float64, numbers)
            optimizer.step()
        ends.append([p.detach() for p in params])
    for got, right in zip(*ends, strict=True):
        assert bool(((got - right).abs() <= 1e-12).all())
    assert device.launches
