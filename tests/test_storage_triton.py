"""Items that are not plain in Triton's interpreter against the reference, bit for bit; tests/test_triton_compile.py is
about their code, and tests/test_gpu_storage.py runs it.
"""

from __future__ import annotations

from dataclasses import replace

import kept
import numpy as np
import pytest
import torch
from helpers import CPU, generator, usable

from fasttrain.kernels import kept_table, table, triton
from fasttrain.kernels.item import Item
from fasttrain.precision.draws import full_index, operand_key
from fasttrain.rule import Rule

# Not-a-number and overflow are what is tested; NumPy, under the interpreter, warns of them.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
              pytest.mark.skipif(bool(usable("triton")), reason=str(usable("triton")))]
SIZES = ((0, 1, 255, 5000), (256, 513, 7), (257, 511, 128, 129), (512, 127, 2))


def step(items: list[Item], what: str) -> None:
    wanted = kept.oracle(items)
    triton.step(items)
    kept.compare(items, wanted, what)


def run(case: kept.Case, sizes: tuple[int, ...], steps: int = 2) -> None:
    numbers = generator(len(case.codecs))
    items = [case.random(size, numbers, key=(1 << 63) + 12345 * size, step=3) for size in sizes]
    for index in range(steps):
        step(items, f"{case}, step {index}")
        kept.new_gradients(items, numbers)
        items = [replace(item, key=item.key + 1) for item in items]


@pytest.mark.parametrize("index, case", list(enumerate(kept.some_cases())), ids=lambda value: str(value))
def test_bits(index, case):
    run(case, SIZES[index % len(SIZES)])


@pytest.mark.slow
@pytest.mark.parametrize("case", kept.all_pairs(), ids=str)
def test_every_pair(case):
    run(case, (5000, 513), steps=3)


@pytest.mark.parametrize("codecs", ["split16 bf16 int4+S int8+P+S bf16+S", "split8 bf16 e4m3 e5m2+P"])
def test_many_chunks(codecs, monkeypatch):
    """Chunks of the size that a GPU takes: blocks, bytes of two codes and places in the full parameter go on."""
    monkeypatch.setattr(triton, "BLOCK_INTERPRETED", 1024)
    for place in (kept.SHARD, (0, 0, 0), ((1 << 32) - 700, 0, 0), (5, 2_000, 7_000)):
        case = kept.Case("AdamW", codecs, zero=True, clip=0.5, place=place)
        run(case, (3001, 2048), steps=1)


def test_a_long_one():
    """More than one chunk of the interpreter's own size."""
    run(kept.Case("AdamW", "bf16+S bf16 int8+S int8+P", place=(1 << 40, 1 << 13, 1 << 14)), (70_001,), steps=1)


@pytest.mark.parametrize("offsets", [(1,), (3, 0, 1, 2), (8,)])
def test_misaligned(offsets, monkeypatch):
    monkeypatch.setattr(triton, "BLOCK_INTERPRETED", 512)
    case, numbers = kept.Case("AdamW", "split16 bf16 int8 int4+P"), generator(4)
    items = [case.random(600, numbers, offsets=offsets)]
    step(items, str(offsets))


@pytest.mark.parametrize("average", kept.AVERAGES)
def test_difficult_averages(average):
    step([kept.difficult_parameter("f32", average)], average)


@pytest.mark.parametrize("p", kept.PARAMS)
def test_difficult_parameters(p):
    step([kept.difficult_parameter(p)], p)


@pytest.mark.parametrize("state", kept.STATES)
def test_difficult_states(state):
    items = [kept.difficult_state(state)]
    step(items, state)
    step(items, f"{state}, again")  # decodes what was written


@pytest.mark.parametrize("state", kept.BLOCKS)
def test_what_lies_outside_counts_as_zero(state):
    """Zeros that a rule turns into the largest of the block, were they elements."""
    rule = Rule("Falling", ("m",), lambda step: {"from_one": 1.0}, lambda p, g, m, k: (p, k.from_one - m))
    for size in (100, 300):
        made = kept.Case("SGDMomentum", f"f32 f32 {state}").item([torch.zeros(size)] * 2 + [torch.full((size,), 0.75)])
        step([replace(made, rule=rule, row=[1.0, 1.0, torch.inf, 1.0, 0.0])], state)


def test_plain_and_other_items_together():
    """Each kind has a launch of its own; zeroed gradients and clipping do not make another."""
    numbers = generator(9)
    cases = [kept.Case("AdamW", "split16 bf16 int8 int8+P", zero=i == 1, clip=0.2 if i == 2 else torch.inf)
             for i in range(3)]
    items = [case.random(300, numbers) for case in cases]
    plain = kept.Case("AdamW", "f32 f32 f32 f32").random(300, numbers)
    items.append(replace(plain, codecs=(), extras=(), row=plain.row[:-3]))
    assert len(table.grouped(items)) == 2
    step(items, "together")


def test_wrong_storage_of_float64_is_refused():
    item = kept.Case("SGDMomentum", "f64 f64 int8").random(10, generator(1))
    before = item.tensors[0].clone()
    with pytest.raises(ValueError, match=r"size 10 is float64 .* codec 10"):
        triton.step([item])
    assert torch.equal(item.tensors[0], before)


def table_of(items: list[Item], chunk: int) -> tuple[np.ndarray, np.ndarray]:
    rows, row_of = kept_table.rows(items)
    return kept_table.build(items, chunk, kept_table.describe(items, row_of)), rows


def test_table():
    """Columns say what the header of the module promises."""
    item = kept.Case("AdamW", "split16 bf16 int8 int4+P+S", zero=True).random(1100, generator(2), key=5)
    built, rows = table_of([item, replace(item, zero=False, key=6)], 512)
    assert built.shape == (6, 4 + 3 + 3 + 4)
    addresses = [array.data_ptr() for array in (*item.tensors, item.extras[0], item.extras[2], item.extras[3])]
    steps = [1024, 1024, 512, 256, 1024, 2 * 4, 4 * 4]
    for chunk in range(3):
        assert built[chunk, :7].tolist() == [at + chunk * each for at, each in zip(addresses, steps, strict=True)]
    assert built[:, 7].tolist() == [512, 512, 76] * 2
    assert built[:, 8].tolist() == [0] * 3 + [1] * 3
    assert (built[:, 9] & 2).tolist() == [2] * 3 + [0] * 3
    words = rows[:, -2:].copy().view(np.uint32).astype(np.uint64)
    assert (words[:, 0] | words[:, 1] << 32).tolist() == [operand_key(5, 3), operand_key(6, 3)]
    for chunk in (0, 16, 768, 1 << 31):
        with pytest.raises(ValueError, match=f"chunk is {chunk}"):
            table_of([item], chunk)


@pytest.mark.parametrize("place", [(0, 0, 0), (7, 0, 9), kept.SHARD, (3, 512, 4096), (1, 1 << 31, 1 << 33),
                                   (2, (1 << 30) + 300, 1 << 40), (0, 1, 64)])
def test_places_of_chunks(place):
    """origin + i + (lead + i) // run * gap is the place of every element, and lead + i has 32 bits."""
    case = kept.Case("SGD", "bf16+S f32", place=place)
    item = case.random(3000, generator(3))
    built, _ = table_of([item], 512)
    found = []
    for count, (origin, lead, run, gap) in zip(built[:, 2], built[:, -4:], strict=True):
        i = np.arange(count)
        assert 0 <= lead < run <= 1 << 30
        found.append(origin + i + (lead + i) // run * gap)
    assert np.concatenate(found).tolist() == full_index(place, 3000, CPU).tolist()


def test_places_past_a_far_run():
    """The second run of a shard begins beyond 2^31 local elements."""
    begin = np.array([(1 << 31) - 512, (1 << 31) - 512 + 1024])
    run, pitch, first = (1 << 31) + 100, 1 << 35, 11
    origin, lead, shown, gap = kept_table.places(begin, *(np.full(2, value) for value in (first, run, pitch)))
    for chunk in range(2):
        i = np.arange(1024)
        local = begin[chunk] + i
        got = origin[chunk] + i + (lead[chunk] + i) // shown[chunk] * gap[chunk]
        assert got.tolist() == (first + local // run * pitch + local % run).tolist()
        assert lead[chunk] + 1024 < 1 << 31
