"""The CUDA kernels' own text, compiled for the host and walked block by block and thread by thread, against the oracle.

What it cannot show is the GPU's own conversions, division and root: tests/test_gpu_step.py does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same_bits, generator, needs_native, normal, specials
from torch import Tensor

from fasttrain.kernels import cuda, native, reference, table
from fasttrain.kernels.item import Item
from fasttrain.kernels.trace import trace
from fasttrain.optim import COMMON_RULES, ELEMENTWISE_RULES, SGD, Adam, Lion
from fasttrain.rule import Rule

pytestmark = needs_native

DTYPES = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16}
COMBINATIONS = [("F32", "F32", "F32"), ("F64", "F64", "F64"), ("BF16", "BF16", "BF16"), ("F16", "F16", "F16"),
                ("BF16", "F32", "BF16"), ("F16", "F32", "F16"), ("BF16", "BF16", "F32")]
PAIRS = [(rule, kinds) for rule in ELEMENTWISE_RULES
         for kinds in (COMBINATIONS if rule in COMMON_RULES else COMBINATIONS[:2])]
PAIR_NAMES = ["-".join((rule.name, *kinds)) for rule, kinds in PAIRS]
SIZES = (0, 1, 2, 7, 8, 9, 15, 16, 17, 63, 257, 1000, 4099)
GUARD = 77.0
OPTIONS = dict(
    lr=0.03, betas=(0.83, 0.97), eps=1e-6, weight_decay=0.04, momentum=0.8, dampening=0.3, rho=0.9, lr_decay=0.1,
    alpha=0.9, lambd=0.2, eta=0.04, mu=0.3, momentum_decay=0.1, decoupled_weight_decay=False, mu_product=0.4,
    etas=(0.4, 1.3), step_sizes=(1e-3, 2.0), no_prox=False, beta3_warmup=9, alpha_warmup=9, k=3, weight_sum=0.01,
    lr_max=0.03, warmup_steps=5, r=0.5, weight_lr_power=2.0)


@dataclass
class Guarded:
    """A tensor inside a longer one, whose other elements nobody may write."""

    storage: Tensor
    offset: int
    count: int

    @property
    def view(self) -> Tensor:
        return self.storage[self.offset : self.offset + self.count]

    def untouched(self) -> bool:
        return bool((self.storage[: self.offset] == GUARD).all() and
                    (self.storage[self.offset + self.count :] == GUARD).all())


def guarded(values: Tensor, offset: int) -> Guarded:
    """`values` at `offset` elements past an address that is a multiple of 64 bytes."""
    storage = torch.full((len(values) + offset + 40,), GUARD, dtype=values.dtype)
    assert storage.data_ptr() % 64 == 0
    made = Guarded(storage, offset, len(values))
    made.view.copy_(values)
    return made


def states_of(rule: Rule, count: int, dtype: torch.dtype, numbers: torch.Generator) -> list[Tensor]:
    """Random states; second moments are not negative, nor below the square of a mean."""
    made = [normal((count,), torch.float64, numbers) * (0.01 if name == "grad_avg" else 1) for name in rule.state]
    return [(state.abs() if name in rule.positive else state).to(dtype)
            for name, state in zip(rule.state, made, strict=True)]


def row_of(rule: Rule, step: int, scale: float = 0.5) -> list[float]:
    three = {"betas": (0.83, 0.97, 0.99)} if rule.name.startswith(("Adan", "AdEMAMix")) else {}
    return [scale, *trace(rule).row(step, {**OPTIONS, **three})]


def walk(items: list[Item], blocks: int = 3, threads: int = 4, chunk: int = 64, order: Any = None) -> tuple[int, int]:
    """Step items of one rule and combination with the CUDA kernel's text; counts of wide and of single accesses."""
    name = cuda.kernel_name(items[0].rule, tuple(tensor.dtype for tensor in items[0].tensors))
    assert name is not None
    rows = table.coefficient_rows(items)[0].astype(np.float64 if items[0].dtype == torch.float64 else np.float32)
    order = list(range(blocks)) if order is None else order
    return native.module().cuda_host_walk(name, table.build(items, chunk), rows, blocks, threads, order)


def oracle(items: list[Item]) -> list[Item]:
    """The items as the reference leaves them; neither they nor their counters are touched."""
    copies = [replace(item, tensors=tuple(tensor.clone() for tensor in item.tensors), counter=None) for item in items]
    reference.step(copies)
    return copies


def compare(items: list[Item], wanted: list[Item], what: str) -> None:
    for item, oracle_item in zip(items, wanted, strict=True):
        for name, got, right in zip(("p", "g", *item.rule.state), item.tensors, oracle_item.tensors, strict=True):
            assert_same_bits(got, right, f"{what}, {item.name} {name}")


def make(rule: Rule, kinds: tuple[str, str, str], offsets: tuple[int, int, int], numbers: torch.Generator,
         sizes: tuple[int, ...] = SIZES) -> tuple[list[Item], list[Guarded]]:
    """One item of each size; p, g and states begin `offsets` elements after a multiple of 64 bytes."""
    p, g, s = (DTYPES[kind] for kind in kinds)
    items, made = [], []
    for index, size in enumerate(sizes):
        values = [normal((size,), p, numbers), normal((size,), g, numbers), *states_of(rule, size, s, numbers)]
        kept = [guarded(value, offsets[min(i, 2)]) for i, value in enumerate(values)]
        made += kept
        row = row_of(rule, 1 + index % 3, scale=-0.5 if index % 2 else 0.25)
        items.append(Item(f"size {size}", rule, tuple(one.view for one in kept), row, None))
    return items, made


@pytest.mark.parametrize(("rule", "kinds"), PAIRS, ids=PAIR_NAMES)
def test_bits(rule, kinds):
    """Every kernel, several steps, every size, aligned and not; each block order gives the same."""
    numbers = generator(len(rule.name) + 7 * COMBINATIONS.index(kinds))
    narrow = 1 if kinds == ("F64",) * 3 else 3
    for offsets in ((0, 0, 0), (narrow,) * 3, (1, 0, 2)):
        items, made = make(rule, kinds, offsets, numbers)
        for step in range(3):
            wanted = oracle(items)
            order = torch.randperm(5, generator=numbers).tolist()
            walk(items, blocks=5, threads=(3, 4, 32)[step], chunk=(32, 64, 4096)[step], order=order)
            compare(items, wanted, f"offsets {offsets}, step {step}")
            for item in items:  # a new gradient
                item.tensors[1].copy_(normal(item.tensors[1].shape, item.tensors[1].dtype, numbers))
        assert all(one.untouched() for one in made), "memory beside a tensor was written"


@pytest.mark.parametrize("kinds", COMBINATIONS, ids="-".join)
def test_every_misalignment(kinds):
    """All offsets of p, g and the state within 16 bytes: the kernel peels where a common aligned element exists, makes
    no misaligned access (the host walk raises), and is wide everywhere but in head and tail.
    """
    rule, numbers, count = Lion.rules[0], generator(11), 200
    sizes = [DTYPES[kind].itemsize for kind in kinds]
    width = 16 // min(sizes)
    peeled = 0
    for p in range(16 // sizes[0]):
        for g in range(16 // sizes[1]):
            for s in range(16 // sizes[2]):
                items, made = make(rule, kinds, (p, g, s), numbers, sizes=(count,))
                wanted = oracle(items)
                wide, single = walk(items, chunk=1024)
                compare(items, wanted, f"offsets {p}, {g}, {s}")
                assert all(one.untouched() for one in made)
                heads = [h for h in range(width)
                         if all((offset + h) * size % 16 == 0 for offset, size in zip((p, g, s), sizes, strict=True))]
                packs = (count - heads[0]) // width if heads else 0
                operands = 5  # loads of p, g and the state, stores of p and the state
                assert single == operands * (count - packs * width)
                stored = packs * width * (2 * sizes[0] + sizes[1] + 2 * sizes[2]) // 16
                assert wide >= stored if packs else wide == 0
                peeled += bool(heads and heads[0])
    assert peeled >= width - 1


def test_wide_accesses_are_not_given_up_for_odd_sizes():
    """1,001 elements: one tail of one element, whatever the chunk."""
    items, _ = make(Lion.rules[0], ("F32",) * 3, (0, 0, 0), generator(3), sizes=(1001,))
    _, single = walk(items, blocks=1, threads=1, chunk=256)
    assert single == 5


@pytest.mark.parametrize("kinds", COMBINATIONS, ids="-".join)
@pytest.mark.parametrize("rule", [Adam.rules[1], SGD.rules[5], Lion.rules[0]], ids=lambda rule: rule.name)
def test_special_values(rule, kinds):
    """Every pair of NaN, infinities, zeros, denormals and ends of the range, in each operand."""
    p, g, s = (DTYPES[kind] for kind in kinds)
    pairs = [(a, b) for a in specials(p) for b in specials(g)]
    param = torch.tensor([a for a, _ in pairs], dtype=torch.float64).to(p)
    grad = torch.tensor([b for _, b in pairs], dtype=torch.float64).to(g)
    for value in specials(s):
        states = [torch.full((len(pairs),), value, dtype=torch.float64).to(s) for _ in rule.state]
        items = [Item(f"state {value}", rule, (param.clone(), grad.clone(), *states), row_of(rule, 2, 1.0), None)]
        wanted = oracle(items)
        walk(items)
        compare(items, wanted, rule.name)


def test_denormal_states_become_zero():
    rule = SGD.rules[1]
    state = torch.tensor([2.0**-126, 2.0**-127, -(2.0**-140), -0.0, math.nan])
    item = Item("w", rule, (torch.zeros(5), torch.zeros(5), state), [1.0, 1.0, 1.0, 0.1], None)
    assert trace(rule).coefficients == ["keep", "add", "lr"]
    walk([item])
    assert_same_bits(state, torch.tensor([2.0**-126, 0.0, 0.0, 0.0, math.nan]))


def test_blocks_are_independent():
    """A block that does not run leaves its chunks as they were; more blocks than chunks do nothing more."""
    items, _ = make(Lion.rules[0], ("F32",) * 3, (0, 0, 0), generator(5), sizes=(640,))
    before = items[0].tensors[0].clone()
    walk(items, blocks=10, threads=8, chunk=64, order=[1, 3])
    changed = (items[0].tensors[0] != before).reshape(10, 64).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [1, 3]
    wanted = oracle(items)
    walk(items, blocks=1000, threads=8, chunk=64)
    compare(items, wanted, "1,000 blocks")


def test_rows_of_coefficients_follow_their_items():
    """Many small items, each with a row of its own, in one table."""
    rule, numbers = Adam.rules[0], generator(6)
    items = []
    for step in range(1, 200):
        tensors = (normal((5,), torch.float32, numbers), normal((5,), torch.float32, numbers),
                   *states_of(rule, 5, torch.float32, numbers))
        items.append(Item(f"step {step}", rule, tensors, row_of(rule, step), None))
    wanted = oracle(items)
    walk(items)
    compare(items, wanted, "rows")


def test_misaligned_element_is_refused():
    """The host walk judges addresses as a GPU does: this is what makes the tests of alignment mean something."""
    memory = np.zeros(70, np.uint8)
    begin = -memory.ctypes.data % 16 + 1
    items, _ = make(SGD.rules[0], ("F32",) * 3, (0, 0, 0), generator(7), sizes=(8,))
    rows = table.build(items, 16)
    rows[0, 0] = memory.ctypes.data + begin
    with pytest.raises(RuntimeError, match=r"4 bytes at address \d+, which is no multiple"):
        native.module().cuda_host_walk("step_SGD_F32_F32_F32", rows, np.ones((1, 2), np.float32), 1, 1, [0])


def test_wrong_arguments_are_refused():
    run = native.module().cuda_host_walk
    rows, chunks = np.ones((1, 2), np.float32), np.zeros((1, 5), np.int64)
    with pytest.raises(ValueError, match="no kernel is called step_Unknown"):
        run("step_Unknown", chunks, rows, 1, 1, [0])
    with pytest.raises(ValueError, match="int64 array of 5 columns"):
        run("step_SGD_F32_F32_F32", np.zeros((1, 6), np.int64), rows, 1, 1, [0])
    with pytest.raises(ValueError, match="float32 with 2 columns"):
        run("step_SGD_F32_F32_F32", chunks, rows.astype(np.float64), 1, 1, [0])


def test_table():
    """Chunks cover every element once; columns say what the header of the module promises."""
    items, _ = make(Lion.rules[0], ("BF16", "F32", "BF16"), (0, 0, 8), generator(8), sizes=(100, 0, 16, 33))
    items[2], items[3] = replace(items[2], row=[3.0] * 7), replace(items[3], row=items[0].row)
    built = table.build(items, 32)
    assert built[:, 3].tolist() == [32, 32, 32, 4, 16, 32, 1]
    assert built[:, 4].tolist() == [0, 0, 0, 0, 2, 0, 0]
    for column, size in ((0, 2), (1, 4), (2, 2)):
        tensor = items[0].tensors[column]
        assert built[:4, column].tolist() == [tensor.data_ptr() + 32 * size * i for i in range(4)]
    assert built[:, 5].tolist() == [1] * 7
    moved, _ = make(Lion.rules[0], ("BF16", "F32", "BF16"), (0, 1, 8), generator(8), sizes=(100,))
    assert table.build(moved, 32)[:, 5].tolist() == [0] * 4
    for chunk in (0, -16, 8, 1 << 30):
        with pytest.raises(ValueError, match=f"chunk is {chunk}"):
            table.build(items, chunk)
    assert len(table.build([], 32)) == 0


def test_zeros_of_either_sign_are_two_rows():
    p = torch.ones(1)
    items = [Item("w", SGD.rules[0], (p, p), (1.0, zero), None) for zero in (0.0, -0.0, 0.0)]
    rows, row = table.coefficient_rows(items)
    assert row == [0, 1, 0]
    assert np.signbit(rows[:, 1]).tolist() == [False, True]
