"""The CUDA kernels of reductions, walked on the host (tests/cuda_host.py): every bit of the eager tree."""

from __future__ import annotations

import math
from dataclasses import replace

import cuda_host
import numpy as np
import pytest
import torch
from helpers import LAYOUTS, REALS, assert_same_bits, generator, make, needs_native, normal, specials
from test_cuda_walk import guarded

from fasttrain.kernels import cuda, cuda_sums, native, norm, stages
from fasttrain.kernels.item import Item
from fasttrain.kernels.trace import trace
from fasttrain.optim import LAMB, LARS, StableAdamW
from fasttrain.optim.header import STAGES

pytestmark = needs_native

SIZES = (0, 1, 7, 15, 16, 17, 255, 1023, 1024, 1025, 4095, 4096, 4097, 8191, 8192, 8193, 5 * 4096 + 3, 65_536, 140_001)


@pytest.fixture
def device(monkeypatch):
    return cuda_host.install(monkeypatch)


def check(tensors, what=""):
    sums, flag = cuda_sums.squares(tensors)
    wanted, bad = norm.reference(tensors)
    assert_same_bits(sums, wanted, what)
    assert flag.shape == ()
    assert flag.dtype == torch.bool
    assert bool(flag) == bool(bad), what


# --- Pass A -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_sizes_and_grids(device, dtype):
    """The same bits for any grid, among others and alone; three launches whatever the number of tensors."""
    numbers = generator(1)
    tensors = [normal((size,), dtype, numbers) for size in SIZES]
    for grid, warps in ((None, 8), (1, 1), (3, 2)):
        device.grid, device.warps = grid, warps
        device.launches.clear()
        check(tensors, f"grid {grid}")
        assert [name for name, _ in device.launches] == [f"squares_{cuda.NAMES[dtype]}", "tree", "tree"]
    for tensor in tensors:
        check([tensor], f"{len(tensor)} alone")


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_every_misalignment(device, dtype):
    """No misaligned access (the walk raises), and none outside of the tensor counts: guards are infinite."""
    for offset in range(64 // dtype.itemsize):
        for size in (1, 3, 40, 1031, 4096, 9001):
            made = guarded(normal((size,), dtype, generator(offset)), offset)
            made.storage[:offset] = made.storage[offset + size :] = math.inf
            check([made.view], f"{offset}, {size}")


def test_accesses_are_wide(device):
    """But for what the words at the ends of a tensor share with others, and two for each sum."""
    tensor = guarded(normal((8192 + 5,), torch.float32, generator(2)), 3).view
    cuda_sums.squares([tensor])
    wide, single = device.counts["squares_F32"]
    assert single == 1 + 3 + 1 + 3 + 1  # of each of two blocks both ends; the third has a word after its first
    assert wide == (8192 + 5 - single) // 4 + 2


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_special_values(device, dtype):
    for value in specials(dtype):
        for place in (0, 1, 15, 16, 515, 4095, 4096, 8999):
            tensor = torch.ones(9000, dtype=dtype)
            tensor[place] = value
            check([torch.ones(3, dtype=dtype), tensor], f"{value} at {place}")
            assert bool(cuda_sums.squares([tensor])[1]) == (not math.isfinite(value))
    largest = torch.full((9000,), torch.finfo(dtype).max, dtype=dtype)
    check([largest])
    assert not cuda_sums.squares([largest])[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number(device, dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    check([every[every.isfinite()]])
    for some in every.reshape(-1, 2048):
        check([some])


def test_layouts_and_dtypes_together(device):
    numbers = generator(3)
    tensors = [make(layout, lambda size, dtype=dtype: normal(size, dtype, numbers)).view
               for layout in LAYOUTS for dtype in REALS]
    tensors += [torch.complex(normal((3, 50), torch.float32, numbers), normal((3, 50), torch.float32, numbers)).mT,
                torch._neg_view(normal((33,), torch.float64, numbers))]
    check(tensors)
    assert len(device.launches) == 6


def test_many_tensors_and_a_tree_of_several_levels(device):
    """300 tensors are two levels of the tree over tensors; 257 pairs of blocks two levels of a tensor's own."""
    numbers = generator(4)
    check([normal((size,), torch.bfloat16, numbers) for size in range(300)])
    check([normal((257 * 8192 + 1,), torch.bfloat16, numbers)])


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9, 255, 256, 257, 65_536, 65_537])
def test_the_tree(count):
    numbers = generator(count)
    pairs = normal((count, 2), torch.float64, numbers)
    rows, size = cuda_sums.tree_rows(np.zeros(1, np.int64), np.array([count]))
    memory = torch.full((size // 16 + 1, 2), math.nan, dtype=torch.float64)
    memory[:count] = pairs
    rows[:, [0, 2]] += memory.data_ptr()
    out = torch.full((2, 2), -1.0, dtype=torch.float64)
    rows[0, 4] = 16
    for warps in (1, 3):
        native.module().cuda_host_walk("tree", rows, out.numpy(), 2, warps, [1, 0])
        assert_same_bits(out[0], norm.tree(pairs))
        assert out.view(torch.uint8)[1, 0].item() == (count > 0)
    assert bool(memory[size // 16 :].isnan().all()), "written past the workspace"


@pytest.mark.parametrize("count", [0, 1, 5, 256, 257, 1000])
def test_total(device, count):
    numbers = normal((count, 2), torch.float64, generator(count))
    for sums in (numbers[:, 0], numbers[:, 0].contiguous()):
        assert_same_bits(cuda_sums.total(sums), norm.tree(sums))
    assert [name for name, _ in device.launches] == ["tree"] * 2
    assert len(device.uploads) == 1


def test_tables_stay(device):
    """Nothing is sent to the device where the addresses are as before; new numbers in them are seen."""
    tensors = [torch.ones(5000), torch.ones(7)]
    check(tensors)
    tensors[0].fill_(2.0)
    check(tensors)
    assert len(device.uploads) == 1
    tensors = [tensor.clone() for tensor in tensors]
    check(tensors)
    assert device.uploads[1:] == [2 * 8], "each of two chunks has a new address"
    first = cuda_sums.squares(tensors)[0].clone()
    kept = cuda_sums.squares(tensors)[0]
    tensors[0].fill_(3.0)
    cuda_sums.squares(tensors)
    assert_same_bits(kept, first, "results are their callers'")


def test_other_dtypes_are_refused(device):
    with pytest.raises(TypeError, match=r"torch\.int64; it takes float32"):
        cuda_sums.squares([torch.ones(3, dtype=torch.int64)])


# --- Stages -----------------------------------------------------------------------------------------------------------

def combinations():
    """Every kernel of a stage: its rule, and the dtypes of p, g and the states."""
    kinds = {name: dtype for dtype, name in cuda.NAMES.items()}
    rules = {rule.name: rule for rule in STAGES}
    names = [name.split("_")[1:] for name in native.module().cuda_kernels() if name.startswith("stage_")] \
        if native.load()[0] is not None else []
    return [(rules[rule], tuple(kinds[kind] for kind in dtypes)) for rule, *dtypes in names]


COMBINATIONS = combinations()
NAMES = ["-".join((rule.name, *(cuda.NAMES[dtype] for dtype in dtypes))) for rule, dtypes in COMBINATIONS]


REDUCTIONS = {
    f"factored_{what}_{kind}" for what in ("rows", "lines", "update", "apply") for kind in cuda.NAMES.values()} | {
    "squares_F32", "squares_F64", "squares_BF16", "squares_F16", "tree"} | {
    "_".join(("stage", rule.name, *(cuda.NAMES[dtype] for dtype in dtypes))) for rule, dtypes in COMBINATIONS}


def row_of(rule, numbers):
    """Coefficients near those of a step: small positive numbers."""
    return [0.25, *(0.01 + torch.rand(len(trace(rule).coefficients), generator=numbers, dtype=torch.float64)).tolist()]


def items_of(rule, dtypes, offsets, numbers, sizes):
    p, g, s = dtypes
    items, made = [], []
    for size in sizes:
        values = [normal((size,), p, numbers), normal((size,), g, numbers)]
        values += [normal((size,), torch.float64, numbers).abs().to(s) if name == "exp_avg_sq" else
                   normal((size,), s, numbers) for name in rule.state]
        kept = [guarded(value, offsets[min(i, 2)]) for i, value in enumerate(values)]
        made += kept
        items.append(Item(f"size {size}", rule, tuple(one.view for one in kept), row_of(rule, numbers),
                          torch.tensor(3.0)))
    return items, made


def step(items):
    """The items and their sums, as the kernels and as the reference make them."""
    wanted = [replace(item, tensors=tuple(tensor.clone() for tensor in item.tensors), counter=None) for item in items]
    sums = cuda_sums.run_stages(items)
    return wanted, sums, torch.from_numpy(stages.run(wanted, "reference"))


def compare(items, wanted, what):
    for item, right in zip(items, wanted, strict=True):
        for name, got, expected in zip(("p", "g", *item.rule.state), item.tensors, right.tensors, strict=True):
            assert_same_bits(got, expected, f"{what}, {item.name} {name}")


def test_every_stage_has_kernels():
    assert {rule.name for rule, _ in COMBINATIONS} == {rule.name for rule in STAGES}
    assert {dtypes[0] for rule, dtypes in COMBINATIONS if rule.name == "LAMBApply"} == set(REALS)


@pytest.mark.parametrize(("rule", "dtypes"), COMBINATIONS, ids=NAMES)
def test_stages(device, rule, dtypes):
    """Every kernel, aligned and misaligned alike and apart: states, parameters and sums; nothing beside them."""
    numbers = generator(len(rule.name))
    widest = 16 // min(dtype.itemsize for dtype in dtypes)
    for offsets in ((0, 0, 0), (1, 1, 1), (widest + 3,) * 3, (1, 0, 2)):
        items, made = items_of(rule, dtypes, offsets, numbers, (0, 1, 33, 600, 4096, 4099, 9001))
        device.warps = 1 + offsets[0] % 3
        wanted, sums, right = step(items)
        compare(items, wanted, f"offsets {offsets}")
        assert_same_bits(sums, right, f"sums, offsets {offsets}")
        assert all(one.untouched() for one in made), "memory beside a tensor was written"
        assert [item.counter.item() for item in items] == [4.0] * len(items)


@pytest.mark.parametrize("rule", [LAMB.rules[0], StableAdamW.rules[0]], ids=lambda rule: rule.name)
def test_special_values_in_stages(device, rule):
    pairs = [(a, b) for a in specials(torch.float32) for b in specials(torch.float32)]
    for value in (0.0, 1.0, math.inf, math.nan, 2.0**-127):
        columns = [torch.tensor(column, dtype=torch.float64).float() for column in zip(*pairs, strict=True)]
        states = [torch.full((len(pairs),), value) for _ in rule.state]
        items = [Item("w", rule, (*columns, *states), [1.0, *row_of(rule, generator(1))[1:]], None)]
        wanted, sums, right = step(items)
        compare(items, wanted, f"{value}")
        assert_same_bits(sums, right)


def test_accesses_of_stages_are_wide(device):
    rule = LAMB.rules[0]
    items, _ = items_of(rule, (torch.float32,) * 3, (0, 0, 0), generator(5), (8192 + 256 + 3,))
    cuda_sums.run_stages(items)
    wide, single = device.counts["stage_LAMBMeasure_F32_F32_F32"]
    assert single == 3 * 6 + 2 * 3  # the tail's elements in six accesses each; two words of three blocks' sums
    assert wide == (8192 + 256) // 4 * 6


def test_rules_and_dtypes_together(device):
    """One launch for each rule and combination and one for all sums, in the order of the items."""
    numbers = generator(6)
    items = []
    for size in (5, 4097, 0, 70_001):
        for rule, dtypes in COMBINATIONS:
            if len(rule.sums or ()) == 2:
                items += items_of(rule, dtypes, (0, 0, 0), numbers, (size,))[0]
    before = [[tensor._version for tensor in item.tensors] for item in items]
    wanted, sums, right = step(items)
    compare(items, wanted, "together")
    assert_same_bits(sums, right)
    kinds = sum(len(rule.sums or ()) == 2 for rule, _ in COMBINATIONS)
    assert len(device.launches) == kinds + 1
    assert all(tensor._version == version + (index != 1) for item, versions in zip(items, before, strict=True)
               for index, (tensor, version) in enumerate(zip(item.tensors, versions, strict=True)))
    cuda_sums.run_stages(items)
    assert len(device.uploads) == 1, "rows and tables; then nothing, since nothing changed"
    items = [replace(item, row=[0.5, *item.row[1:]]) for item in items]
    cuda_sums.run_stages(items)
    items = [replace(item, tensors=(item.tensors[0], item.tensors[1].clone(), *item.tensors[2:])) for item in items]
    wanted, sums, right = step(items)
    compare(items, wanted, "new gradients")
    assert_same_bits(sums, right)
    first, rows, addresses = device.uploads
    assert max(rows, addresses) < first / 3


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("make_optimizer", [LAMB, StableAdamW, LARS],
                         ids=["LAMB", "StableAdamW", "LARS"])
def test_optimizers(device, monkeypatch, dtype, make_optimizer):
    """Whole optimizers against the reference; the layouts, and what goes elsewhere, take the same steps."""
    monkeypatch.setattr(cuda, "why_not", lambda device: None)
    numbers, ends = generator(7), []
    values = [normal(shape, dtype, numbers) for shape in ((5000,), (30, 7), (), (0,), (64, 65))]
    grads = [[normal(value.shape, dtype, numbers) for value in values] for _ in range(3)]
    for backend in ("cuda", "reference"):
        params = [torch.nn.Parameter(value.clone()) for value in values]
        params.append(torch.nn.Parameter(values[4].clone().t()))
        optimizer = make_optimizer(params, lr=0.1, backend=backend)
        for given in grads:
            for p, grad in zip(params, [*given, given[4].t()], strict=True):
                p.grad = grad
            optimizer.step()
        ends.append([*params, *(value for p in params for value in optimizer.state[p].values())])
    for got, wanted in zip(*ends, strict=True):
        assert_same_bits(got, wanted)
    assert {name.split("_")[0] for name, _ in device.launches} == {"stage", "tree"}


def test_what_has_no_kernel_goes_elsewhere(device):
    """A float32 gradient of a bfloat16 parameter, beside one that has a kernel."""
    numbers, rule = generator(8), LAMB.rules[0]
    items = items_of(rule, (torch.bfloat16, torch.float32, torch.float32), (0, 0, 0), numbers, (100,))[0]
    items += items_of(rule, (torch.float32,) * 3, (0, 0, 0), numbers, (200,))[0]
    assert [cuda_sums.runs(item) for item in items] == [False, True]
    wanted = [replace(item, tensors=tuple(tensor.clone() for tensor in item.tensors), counter=None) for item in items]
    sums = stages.run(items, "cuda")
    assert_same_bits(torch.from_numpy(sums), torch.from_numpy(stages.run(wanted, "reference")))
    compare(items, wanted, "elsewhere")
    assert [name for name, _ in device.launches] == ["stage_LAMBMeasure_F32_F32_F32", "tree"]
