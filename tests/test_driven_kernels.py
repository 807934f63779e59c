"""Steps that a device drives: the kernels' bits are those of the naive one, through a whole run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import kept
import pytest
import torch
from helpers import assert_same_bits, generator, needs_native, normal
from test_cuda_driver import fake as fake
from test_cuda_driver import library as library
from test_cuda_walk import OPTIONS, states_of

from fasttrain.kernels import cuda, driven, reference_driven
from fasttrain.kernels.item import Item
from fasttrain.kernels.prologue import Row
from fasttrain.optim import ASGD, STAGES, Adam, AdamW, Lion, NAdam
from fasttrain.rule import Rule

F32, BF16, F64 = ((torch.float32,) * 3, (torch.bfloat16,) * 3, (torch.float64,) * 3)
SIZES = (5, 0, 4096, 9001)
OF_STAGES = dict(bias_correction=True, always_adapt=False, adapt=True, ratio=0.7, clamp=(0.0, 10.0), elements=1e6,
                 trust_coefficient=1e-3, p_sq=31.0, g_sq=0.4, update_sq=2.7, ratio_sq=2.5e6)


@pytest.fixture(params=[pytest.param("cuda", marks=needs_native), "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend, where there is no GPU: its kernels' own text, or its interpreter."""
    if request.param == "cuda":
        request.getfixturevalue("fake")
        monkeypatch.setattr(cuda, "why_not", lambda device: None)
    else:
        pytest.importorskip("triton", reason="triton is not installed")
    return request.param


class Run:
    """Items and rows, those of an oracle beside them, and what the rows read.

    Rows are in pairs, of one counter each; the first of a pair reads `found[0]`, the other one `found[1]`.
    """

    def __init__(self, seed: int) -> None:
        self.numbers = generator(seed)
        self.items: list[Item] = []
        self.rows: list[Row] = []
        self.row_of: list[int] = []
        self.found = [torch.tensor(False), torch.tensor(0.0)]
        self.lr, self.grad_scale, self.norm = torch.tensor(0.05), torch.tensor(4.0), torch.tensor(3.0).double()
        self.draws = [torch.tensor(7), torch.tensor((1 << 40) + 3)]

    def options(self, rule: Rule, **more: Any) -> dict[str, Any]:
        three = {"betas": (0.83, 0.97, 0.99)} if rule.name.startswith(("Adan", "AdEMAMix")) else {}
        values = {**OPTIONS, **OF_STAGES, **three, "lr": self.lr, **more}
        return {name: values[name] for name in rule.hyperparameters}

    def add(self, items: list[Item], **more: Any) -> Run:
        """Add items of one rule, under two rows."""
        first = len(self.rows)
        for number in (0, 1):
            steps = torch.tensor(3.0 + number)
            self.rows.append(Row(self.options(items[0].rule), counter=steps, scale=-1.0 if number else 1.0,
                                 grad_scale=self.grad_scale, found=self.found[number], norm=self.norm, max_norm=2.0,
                                 seed=11 - number * (1 << 63), draws=self.draws[number], **more))
            own = items[number::2]
            counters = [steps, *(steps.clone() for _ in own[1:])]
            self.items += [replace(item, row=(), counter=one) for item, one in zip(own, counters, strict=True)]
            self.row_of += [first + number] * len(own)
        return self

    def plain(self, rule: Rule, dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...] = SIZES, **more: Any) -> Run:
        p, g, s = dtypes
        return self.add([Item(f"{rule.name} {size}", rule, (normal((size,), p, self.numbers),
                                                            normal((size,), g, self.numbers),
                                                            *states_of(rule, size, s, self.numbers)), (), None)
                         for size in sizes], **more)

    def kept(self, case: kept.Case, sizes: tuple[int, ...] = SIZES) -> Run:
        return self.add([case.random(size, self.numbers, key=90 + size) for size in sizes],
                        clip_value=0.5, ema_decay=0.9)

    # --- The oracle

    def twin(self) -> Run:
        """The same numbers in memory of their own."""
        other = Run(0)
        other.found, other.draws = ([one.clone() for one in ones] for ones in (self.found, self.draws))
        other.lr, other.grad_scale, other.norm = self.lr.clone(), self.grad_scale.clone(), self.norm.clone()
        copies = {id(mine): its for mine, its in zip(
            (*self.found, *self.draws, self.lr, self.grad_scale, self.norm),
            (*other.found, *other.draws, other.lr, other.grad_scale, other.norm), strict=True)}
        other.items = kept.copied(self.items)
        copies |= {id(mine.counter): its.counter for mine, its in zip(self.items, other.items, strict=True)}
        for row in self.rows:
            values = {name: copies.get(id(getattr(row, name)), getattr(row, name)) for name in vars(row)}
            values["hyperparameters"] = {name: copies.get(id(one), one) for name, one in row.hyperparameters.items()}
            other.rows.append(Row(**values))
        other.row_of = self.row_of
        return other


def same(run: Run, wanted: Run, what: str) -> None:
    for item, right in zip(run.items, wanted.items, strict=True):
        for got, expected in zip((*item.tensors, *item.extras, item.counter),
                                 (*right.tensors, *right.extras, right.counter), strict=True):
            if got is not None:
                assert_same_bits(kept.raw(got), kept.raw(expected), f"{what}, {item.name}")
    assert [one.tolist() for one in run.draws] == [one.tolist() for one in wanted.draws], what


def go(run: Run, backend: str) -> tuple[Any, Any]:
    """A run of steps beside the naive one: made, skipped in part and as a whole, with other numbers and gradients."""
    twin = run.twin()
    steps = driven.driven(run.items, run.rows, run.row_of, backend), \
        reference_driven.driven(twin.items, twin.rows, twin.row_of)
    for number, found in enumerate(((0, 0), (1, 0), (1, float("nan")), (0, 0))):
        for one in (run, twin):
            for flag, value in zip(one.found, found, strict=True):
                flag.fill_(value)
            one.lr.fill_(0.05 / (1 + number))
            one.norm.fill_((3.0, 0.5, 7.0, 9.0)[number])
        versions = [item.tensors[0]._version for item in run.items]
        for step in steps:
            step.launch()
        assert_same_bits(steps[0].sums, steps[1].sums, f"sums, step {number}")
        same(run, twin, f"step {number}")
        assert all(item.tensors[0]._version > old for item, old in zip(run.items, versions, strict=True))
        kept.new_gradients(run.items, generator(number))
        kept.new_gradients(twin.items, generator(number))
    return steps


RULES = [AdamW.rules[0], Lion.rules[0], Adam.rules[0], NAdam.rules[0], ASGD.rules[0]]


def test_plain_items(backend: str) -> None:
    """Several rules and dtypes in one step; a row of two computations is made for each."""
    run = Run(1)
    for rule, dtypes in zip(RULES, (F32, BF16, F64, F32, F32), strict=True):
        run.plain(rule, dtypes)
    step, _ = go(run, backend)
    if backend == "cuda":
        assert step.launches == len(RULES) + 3


CASES = [kept.Case("AdamW", "split16 bf16 int8 int8+P", zero=True), kept.Case("AdamW", "bf16+S bf16 int8 int8+P"),
         kept.Case("AdamW", "split16 bf16 bf16+S bf16+S", zero=True, place=kept.SHARD),
         kept.Case("SGDMomentum", "split16 bf16 int8")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_items_that_are_not_plain(backend: str, case: kept.Case) -> None:
    """With clipping by value; of skipped items the gradients are zeroed where a step would."""
    step, _ = go(Run(2).kept(case), backend)
    if backend == "cuda":
        assert step.launches == 4 + ("+S" in case.codecs)


def test_what_cuda_has_not_is_tritons(backend: str) -> None:
    """An average, a codec; rows that a part of each backend reads are counted once, at the end."""
    pytest.importorskip("triton", reason="triton is not installed")
    run = Run(3).kept(kept.Case("AdamW", "f16+S f16 int4+S int4+P+S bf16+S", zero=True), (7, 1500))
    run.kept(CASES[1], (300, 12, 40, 5))
    first = len(run.rows) - 2
    run.row_of[:2] = [first, first + 1]  # rows of both, whose counters are those of the others
    go(run, backend)


@pytest.mark.parametrize("sums", [2, 0], ids=["sums", "none"])
def test_stages(backend: str, sums: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of items that are skipped stay; a rule of other sums, or of none, beside them."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr("fasttrain.kernels.triton_sums.BLOCKS_INTERPRETED", 1)  # so that there are several chunks
    rules = [rule for rule in STAGES if len(rule.sums or ()) == sums][:2]
    run = Run(13)
    for rule, dtypes in zip(rules, (F32, F64), strict=False):
        run.plain(rule, dtypes, (5, 0, 5000))
    if sums:
        run.plain(Lion.rules[0], BF16, (9, 40))
    for step in go(run, backend):
        assert step.sums.shape == (len(run.items), sums)
