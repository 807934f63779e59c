"""The CUDA kernels of items that are not plain, walked on the host (tests/test_cuda_walk.py), against the reference.

What it cannot show is what the GPU has instructions for: conversions, division, root, the estimate of a root, the
largest of a warp. tests/test_gpu_storage.py does.
"""

from __future__ import annotations

import math
from dataclasses import replace

import kept
import numpy as np
import pytest
import torch
from helpers import generator, needs_native
from torch import Tensor

from fasttrain.kernels import cuda, kept_table, native
from fasttrain.kernels.item import Item
from fasttrain.kernels.trace import trace

pytestmark = needs_native

COMBINATIONS = ["AdamW split16 bf16 f32 f32", "AdamW split16 bf16 bf16 bf16", "AdamW split16 bf16 bf16+S bf16+S",
                "AdamW split16 bf16 int8 int8+P", "AdamW split8 bf16 int8 int8+P", "AdamW bf16+S bf16 int8 int8+P",
                "AdamW master_bf16 bf16 f32 f32", "Lion split16 bf16 int8", "SGDMomentum split16 bf16 int8"]
KEEPS = (1.0, 1.0 + 2.0**-23, 1.0 - 2.0**-24)
SIZES = (0, 1, 8, 255, 256, 257, 511, 512, 513, 5000)


def name_of(combination: str) -> str:
    rule, *codecs = combination.split()
    return "_".join(["kept", rule, *(cuda.codec_name(kept.number(name)) for name in codecs)])


def case_of(combination: str, **more) -> kept.Case:
    rule, _, codecs = combination.partition(" ")
    return kept.Case(rule, codecs, **more)


def walk(items: list[Item], blocks: int = 3, warps: int = 2, chunk: int = 512, order: list[int] | None = None,
         ) -> tuple[int, int]:
    """Step items of one rule and storage with the CUDA kernel's text; counts of 16-byte and of smaller accesses."""
    name = cuda.kernel_name(items[0].rule, tuple(tensor.dtype for tensor in items[0].tensors), items[0].codecs)
    assert name is not None
    rows, row_of = kept_table.rows(items)
    built = kept_table.build(items, chunk, kept_table.describe(items, row_of))
    order = list(range(blocks)) if order is None else order
    counts = native.module().cuda_host_walk(name, built, rows, blocks, warps, order)
    for item in items:
        if item.counter is not None:
            item.counter.add_(1)
    return counts


def step(items: list[Item], what: str, **more) -> tuple[int, int]:
    wanted = kept.oracle(items)
    counts = walk(items, **more)
    kept.compare(items, wanted, what)
    return counts


def test_the_list_of_kernels():
    found = {name for name in native.module().cuda_kernels() if name.startswith("kept_")}
    assert found == {name_of(one) for one in COMBINATIONS}


@pytest.mark.parametrize("others", ["AdamW split16 bf16 int8 int8+P f32", "AdamW split16 bf16 int4 int4+P",
                                    "AdamW split16 f32 int8 int8+P", "AdamL2 split16 bf16 f32 f32"])
def test_what_goes_elsewhere(others):
    """An EMA, a codec, a gradient or a rule that is not in the list."""
    item = case_of(others).random(1, generator(0))
    assert cuda.kernel_name(item.rule, tuple(tensor.dtype for tensor in item.tensors), item.codecs) is None


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_bits(combination):
    """Several steps, every size, place and order of blocks; with zeroing and clipping, together and without."""
    numbers = generator(len(combination))
    for round_number, (place, clip) in enumerate([((0, 0, 0), math.inf), (kept.SHARD, 0.4), ((1 << 32, 7, 9), 0.1),
                                                  (((1 << 32) - 300, 0, 0), math.inf)]):
        case = case_of(combination, zero=round_number % 2 == 1, clip=clip, place=place)
        items = [case.random(size, numbers, step=3, scale=0.25, key=(1 << 64) - 1 - size) for size in SIZES]
        for index in range(2):
            order = torch.randperm(5, generator=numbers).tolist()
            step(items, f"{combination}, {place}, step {index}", blocks=5, warps=(1, 3)[index], order=order,
                 chunk=(512, 1024, 4096, 8192)[(index + 2 * round_number) % 4])
            kept.new_gradients(items, numbers)
            items = [replace(item, key=item.key - 99999, zero=not item.zero) for item in items]


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_difficult_values(combination):
    """Parameters that keep every bit, gradients and states over the whole range, blocks that are broken or all zero."""
    case, values = case_of(combination), kept.difficult()
    names = trace(kept.BY_NAME[case.rule]).coefficients
    for keep, decay in zip(KEEPS, (0.0, 1.0, 0.5), strict=True):
        states = [values.flip(0).abs() if one & kept.POSITIVE else values.flip(0)
                  for one in kept.numbers_of(case.codecs)[2:]]
        item = case.item([values, values.roll(256 * 5), *states], key=3)
        scalars = dict(b1=decay, a1=1.0, b2=decay, a2=1.0, keep=keep, rate=0.0, eps=1e-8, lr=0.0, add=1.0)
        row = [1.0, *(scalars[name] for name in names), math.inf, 1.0, 0.0]
        step([replace(item, row=row)], f"{combination}, keep {keep}")


def midpoints(keep: float) -> Item:
    """An item whose new state is keep times (c - 1/2)^2, beside one of 127^2: c^2 plus a gradient of 1/4 - c."""
    c = torch.arange(256) % 64
    values = (c * c).float()
    values[-1] = 127.0**2
    g = 0.25 - c.float()
    g[-1] = 0.0
    item = kept.Case("SGDMomentum", "split16 bf16 int8").item([values, g, values])
    return replace(item, row=[1.0, keep, 1.0, 0.1, math.inf, 1.0, 0.0])


@pytest.mark.parametrize("keep", KEEPS)
def test_midpoints_of_square_codes(keep):
    item = midpoints(keep)
    assert item.tensors[2][:64].tolist() == list(range(64))  # the unit is one
    step([item], "midpoints")
    if keep == 1.0:  # a tie is rounded up
        assert item.tensors[2][1:64].tolist() == list(range(1, 64))


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_accesses(combination):
    """Whole tiles are loaded and stored in 16 bytes, codes of one byte in 8; the rest one by one."""
    case = case_of(combination)
    codecs = kept.numbers_of(case.codecs)
    item = case.random(1024, generator(8))
    wide, small = step([item], "wide", chunk=1024)
    times = []  # bytes of an element, and loads and stores of it
    for operand, (one, main, extra) in enumerate(zip(codecs, item.tensors, item.extras, strict=True)):
        copy = kept.codec(one).name.startswith("master")  # its first array is only written
        times.append((main.element_size(), 1 if operand == 1 or copy else 2))
        if extra is not None and not kept.codec(one).block:
            times.append((extra.element_size(), 2))
    assert wide == 1024 * sum(size * n for size, n in times if size > 1) // 16
    blocks = sum(kept.codec(one).block > 0 for one in codecs)
    codes = 1024 // 8 * sum(n for size, n in times if size == 1)
    assert small == codes + blocks * (1024 // 8 + 1024 // 256)  # every lane reads its unit, one writes it
    ragged = case.random(767, generator(8))
    assert step([ragged], "ragged", chunk=1024, warps=1)[0] == wide // 2


@pytest.mark.parametrize("offsets", [(1,), (0, 1, 0, 0), (8,), (3, 0, 5, 1)])
@pytest.mark.parametrize("combination", [COMBINATIONS[3], COMBINATIONS[4]])
def test_misaligned(combination, offsets):
    """No access is at an address that a GPU would refuse (the host walk raises)."""
    numbers = generator(4)
    items = [case_of(combination, zero=True).random(size, numbers, offsets=offsets) for size in (1000, 257)]
    wide, _ = step(items, str(offsets), chunk=1024)
    assert wide == 0 or offsets == (8,)


def test_blocks_and_warps_are_independent():
    """A block of threads that does not run leaves its chunks as they were."""
    item = case_of(COMBINATIONS[3]).random(5120, generator(5))
    before = item.tensors[0].clone()
    walk([item], blocks=10, warps=8, order=[1, 3])
    changed = (item.tensors[0] != before).reshape(10, 512).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [1, 3]


def test_memory_beside_is_not_written():
    """Tensors inside longer ones, whose other elements nobody may write."""
    case, numbers = case_of(COMBINATIONS[3], zero=True), generator(6)
    for size in (255, 513, 1000):
        item = case.random(size, numbers)
        around: list[Tensor] = []

        def inside(tensor: Tensor | None, around: list[Tensor] = around) -> Tensor | None:
            if tensor is None:
                return None
            longer = torch.full((tensor.numel() + 64,), 77, dtype=tensor.dtype)
            longer[32:-32].copy_(tensor)
            around += [longer[:32], longer[-32:]]
            return longer[32:-32]

        item = replace(item, tensors=tuple(map(inside, item.tensors)), extras=tuple(map(inside, item.extras)))
        step([item], f"size {size}")
        assert all(bool((part == 77).all()) for part in around)


def test_wrong_arguments_are_refused():
    run = native.module().cuda_host_walk
    with pytest.raises(ValueError, match="int64 array of 8 columns"):
        run("kept_Lion_SPLIT16_BF16_INT8", np.zeros((1, 5), np.int64), np.ones((1, 9), np.float32), 1, 1, [0])
