"""How tensors are kept, on the CPU backend: every codec and every step of an item that is not plain gives the reference's bits."""

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import LAYOUTS, assert_same_bits, covering, generator, make, needs_native, normal, python, same_bits, specials
from torch import Tensor
from torch.nn import Parameter

from fasttrain.kernels import native, reference
from fasttrain.kernels.item import Item, apart, dense
from fasttrain.kernels.trace import trace
from fasttrain.optim import RULES
from fasttrain.precision.codecs import CODECS, NUMBER, POSITIVE, STOCHASTIC, array_shapes, code_dtype, codec, decode, encode
from fasttrain.precision.draws import full_index, operand_key, parameter_key, random_bits, step_key

pytestmark = needs_native
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
RULE = {rule.name: rule for rule in RULES}
HYPER = dict(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, momentum=0.9, dampening=0.1)
BLOCKS = [kept.number + flags for kept in CODECS if kept.block for flags in (0, POSITIVE, STOCHASTIC, POSITIVE + STOCHASTIC)]
ALONE = [number for number in range(10) if number != NUMBER["f64"]] + [2 + STOCHASTIC, 3 + STOCHASTIC]
SIZES = [0, 1, 2, 3, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1500]


def name_of(number: int) -> str:
    flags = [name for name, flag in (("positive", POSITIVE), ("stochastic", STOCHASTIC)) if number & flag]
    return " ".join([codec(number).name, *flags])


# --- One codec --------------------------------------------------------------------------------------------------------

class Arrays(NamedTuple):
    main: Tensor
    extra: Tensor | None


def arrays(number: int, shape: torch.Size) -> Arrays:
    """Both arrays, full of rubbish: an element that is not written shows."""
    main, extra = array_shapes(number, shape)
    made = [None if size is None else torch.full((math.prod(size),), 0x5A, dtype=torch.uint8).repeat_interleave(dtype.itemsize)
            .view(dtype).view(size) for size, dtype in ((main, code_dtype(number)), (extra, codec(number).extra or F32))]
    return Arrays(*made)


def bits_drawn(count: int, numbers: torch.Generator) -> Tensor:
    return torch.randint(0, 2**32, (count,), generator=numbers)


def encoded(number: int, values: Tensor, draws: Tensor | None, by: str) -> Arrays:
    to = arrays(number, values.shape)
    if by == "cpu":
        drawn = None if draws is None else draws.to(torch.int32)
        native.module().encode(native.reader(), number, values, *to, drawn)
    else:
        encode(number, values, *to, draws)
    return to


def decoded(number: int, kept: Arrays, count: int) -> Tensor:
    values = torch.full((count,), math.nan)
    native.module().decode(native.reader(), number, *kept, values)
    return values


def check_codec(number: int, values: Tensor, numbers: torch.Generator, what: str) -> None:
    draws = bits_drawn(values.numel(), numbers) if number & STOCHASTIC else None
    got, wanted = (encoded(number, values, draws, by) for by in ("cpu", "reference"))
    for one, other in zip(got, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_same_bits(one.view(torch.uint8) if one.element_size() == 1 else one,
                             other.view(torch.uint8) if one.element_size() == 1 else other, f"{name_of(number)}, {what}")
    assert_same_bits(decoded(number, got, values.numel()), decode(number, *wanted, values.numel()), f"{name_of(number)}, {what}")


def contents(numbers: torch.Generator) -> dict[str, Tensor]:
    """What blocks may hold."""
    tiny = 2.0**-126
    special = torch.tensor(specials(F32))
    return {
        "normal": normal((3000,), F32, numbers),
        "wide": normal((3000,), F32, numbers) * 10.0 ** torch.randint(-40, 38, (3000,), generator=numbers),
        "every magnitude": torch.randint(-2**31, 2**31, (3000,), generator=numbers).to(torch.int32).view(F32),
        "special": torch.cat([special, special[special.isfinite()].repeat(60), torch.zeros(300), special]),
        "all equal": torch.full((700,), -0.3),
        "one outlier": torch.cat([torch.full((255,), 1e-20), torch.tensor([3e38]), torch.full((256,), -1e-30)]),
        "denormal": torch.linspace(-2 * tiny, 2 * tiny, 1000),
        "only denormal": torch.linspace(-tiny / 64, tiny / 8, 512),
        "zero": torch.tensor([0.0, -0.0]).repeat(400),
        "a zero block": torch.cat([torch.zeros(256), torch.tensor([-0.0, 1.0]).repeat(128), torch.zeros(256)]),
        "huge": torch.tensor([3.4028235e38, 3.4e38, -3.39e38, 65504.0, 65519.0, 65520.0]).repeat(100),
        "broken": torch.cat([torch.ones(256), torch.tensor([math.nan]), torch.ones(300), torch.tensor([-math.inf])]),
    }


@pytest.mark.parametrize("number", [*ALONE, *BLOCKS], ids=name_of)
def test_codecs(number: int) -> None:
    """Every content, and every size around the ends of blocks and vectors."""
    numbers = generator(1)
    for what, values in contents(numbers).items():
        check_codec(number, values.abs() if number & POSITIVE else values, numbers, what)
    for size in SIZES:
        check_codec(number, normal((size,), F32, numbers), numbers, f"{size} elements")


@pytest.mark.parametrize("number", BLOCKS, ids=name_of)
def test_every_code_is_read(number: int) -> None:
    count = 512
    main, _ = arrays(number, torch.Size([count]))
    codes = torch.arange(256, dtype=torch.uint8).repeat(2)[: main.numel()]
    for unit in (1.0, 0.3, 2.0**-126, 0.0, math.nan):
        kept = Arrays(codes.view(main.dtype), torch.full((count // codec(number).block,), unit))
        assert_same_bits(decoded(number, kept, count), decode(number, *kept, count), f"{name_of(number)}, unit {unit}")


@pytest.mark.parametrize("number", [n for n in BLOCKS if not n & STOCHASTIC], ids=name_of)
def test_codes_at_their_limits(number: int) -> None:
    """On, just below and just above every value between which rounding decides, in blocks whose unit is 1."""
    top = {"int8": 127.0**2, "int4": 49.0, "e4m3": 448.0, "e5m2": 57344.0}[codec(number).name]
    if number & POSITIVE and codec(number).name in ("int8", "int4"):
        top = 1.0
    block = codec(number).block
    main, _ = arrays(number, torch.Size([512]))
    values = decode(number, torch.arange(256, dtype=torch.uint8).repeat(2)[: main.numel()].view(main.dtype),
                    torch.ones(512 // block), 512)
    values = values[values.abs() <= top].unique()
    between = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.arange(-127, 127).add(0.5).square()])
    up, down = (between.nextafter(torch.tensor(end)) for end in (math.inf, -math.inf))
    every = torch.cat([between, up, down])
    every = torch.cat([every, -every]).clamp(-top, top)
    rows = torch.nn.functional.pad(every, (0, -every.numel() % (block - 1))).view(-1, block - 1)
    blocks = torch.cat([torch.full((len(rows), 1), top), rows], 1).flatten()
    check_codec(number, blocks.abs() if number & POSITIVE else blocks, generator(0), "limits")


def sweep(number: int, step: int = 1) -> None:
    """All fp32 numbers: encoded and read again."""
    part = 2**24 * step
    exact = codec(number).name == "split16"
    for begin in range(-(2**31), 2**31, part):
        values = torch.arange(begin, begin + part, step).to(torch.int32).view(F32)
        kept = encoded(number, values, None, "cpu")
        back = decoded(number, kept, values.numel())
        nan = values.isnan()
        if exact:
            assert bool(((back.view(torch.int32) == values.view(torch.int32)) | nan).all())
        else:
            finite = values.isfinite()
            lost = (back.view(torch.int32) - values.view(torch.int32)).abs()  # in units of the last place
            assert bool((back.isfinite() == finite).all())
            assert bool(((lost <= 0xFF) & ((lost <= 0x80) | (values.abs() > 3.4e38)) | ~finite).all())
            assert bool((back == values)[values.isinf()].all())
        assert bool((back.isnan() == nan).all() & kept.main.isnan()[nan].all())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["split16", "split8"])
def test_all_numbers_split(name: str) -> None:
    """Contract 4: all 2^32 patterns."""
    sweep(NUMBER[name])


@pytest.mark.parametrize("name", ["split16", "split8"])
def test_many_numbers_split(name: str) -> None:
    sweep(NUMBER[name], 61)


@pytest.mark.parametrize("number", [n for n in [*ALONE, *BLOCKS] if n & STOCHASTIC], ids=name_of)
def test_stochastic_rounding(number: int) -> None:
    """Contract 5: without bias, exact where the value is one, and infinite only beyond the largest number."""
    numbers = generator(2)
    kept, count = codec(number), 10**6 // 256 * 256
    block = kept.block or count
    draws = bits_drawn(count, numbers)
    for value in (1.001, -0.0123, 3.3e-3, -0.77, 6.1e-6, -1.2e-7):
        value = abs(value) if number & POSITIVE else value
        values = torch.full((count,), value)
        if kept.block:
            values.view(-1, block)[:, 0] = 1.3  # its unit
        draws = draws.roll(1)
        back = decoded(number, encoded(number, values, draws, "cpu"), count)
        drawn = back.view(-1, block)[:, 1 if kept.block else 0:]
        low, high = drawn.aminmax()
        assert bool(((drawn == low) | (drawn == high)).all())  # its two neighbours
        exact = torch.tensor(value).double()
        if number & POSITIVE and low > exact:
            assert low == high  # the least code: a positive value never becomes zero
        else:
            error, deviation = (drawn.double() - exact).mean(), drawn.double().std()
            assert abs(error) <= 5 * deviation / math.sqrt(drawn.numel()) + 1e-6 * abs(exact), (value, error)
            assert low <= exact * (1 + 1e-6) or low <= exact * (1 - 1e-6)
        again = decoded(number, encoded(number, back[:4096], draws.flip(0)[:4096], "cpu"), 4096)
        assert_same_bits(again, back[:4096], "a number that the codec has")


@pytest.mark.parametrize(("number", "largest"), [(2 + STOCHASTIC, 3.3895313892515355e38), (3 + STOCHASTIC, 65504.0)])
def test_stochastic_rounding_at_the_ends(number: int, largest: float) -> None:
    for value in (math.nan, math.inf, -math.inf, largest, -largest, 0.0, -0.0):
        for draw in (0, 2**32 - 1):
            back = decoded(number, encoded(number, torch.full((64,), value), torch.full((64,), draw), "cpu"), 64)
            assert_same_bits(back, torch.full((64,), value))


BOUND = {"int8": 2.0**-7, "int4": 2.0**-3, "e4m3": 2.0**-4, "e5m2": 2.0**-3}  # of the value, or of the block's largest


@pytest.mark.parametrize("number", [n for n in BLOCKS if not n & STOCHASTIC], ids=name_of)
def test_what_blocks_lose(number: int) -> None:
    """Contract 6. Floats: half a step of the value, or of the smallest normal number. Squares: half the distance of two
    squares. Octaves: half a step of the value, or the least code."""
    for what, values in contents(generator(4)).items():
        values = values.abs() if number & POSITIVE else values
        values = torch.where(values.isfinite(), values.clamp(-3.4e38, 3.4e38), values)  # beyond it a unit may overflow
        back = decoded(number, encoded(number, values, None, "cpu"), values.numel()).double()
        for part, got in zip(values.double().split(codec(number).block), back.split(codec(number).block), strict=True):
            largest = part.abs().max()
            if not math.isfinite(largest):
                assert bool(got.isnan().all()), what
                continue
            name = codec(number).name
            unit_floor = 2.0**-126 * (1 + 1e-6)
            if name in ("int8", "int4") and not number & POSITIVE:
                top = 127 if name == "int8" else 7
                bound = (part.abs() / largest.clamp_min(1e-300)).sqrt() * largest / top + largest / top**2
            elif name in ("int8", "int4"):
                bound = part / (16 if name == "int8" else 2) + largest * 2.0 ** (-31 if name == "int8" else -14)
            else:
                least = 2.0**-10 / 448 if name == "e4m3" else 2.0**-17 / 57344
                bound = part.abs() * BOUND[name] + largest * (2 if number & POSITIVE else 1) * least
            assert bool(((got - part).abs() <= bound * (1 + 1e-6) + unit_floor).all()), what
            if number & POSITIVE:
                assert bool(((got > 0) == (part > 0)).all()), what


# --- Steps ------------------------------------------------------------------------------------------------------------

P = [NUMBER["f32"], NUMBER["bf16"], NUMBER["f16"] + STOCHASTIC, NUMBER["bf16"] + STOCHASTIC,
     *(NUMBER[name] for name in ("f16", "split16", "split8", "master_bf16", "master_f16", "kahan_bf16", "kahan_f16"))]
G = [NUMBER["f32"], NUMBER["bf16"], NUMBER["f16"]]
SIGNED = [0, 2, 2 + STOCHASTIC, 3 + STOCHASTIC, *(n for n in BLOCKS if not n & POSITIVE)]
SECOND = [0, 2 + STOCHASTIC, 3, *(n for n in BLOCKS if n & POSITIVE)]
EMA = [None, 0, 2 + STOCHASTIC, 3 + STOCHASTIC]
PLACES = [(0, 0, 0), (7, 0, 0), (2**32 - 300, 0, 0), (5, 100, 1000), (2**33 - 9, 7, 2**32 + 1)]
CLIPS = [math.inf, 0.5, 0.0]
NAMES = ["AdamW", "SGDMomentum", "Lion", "AdamWAmsgrad", "SGD"]


class Case(NamedTuple):
    p: int
    g: int
    first: int
    second: int
    ema: int | None
    place: tuple[int, int, int]
    clip: float
    zero: bool
    rule: str


def cases() -> list[Case]:
    """Enough of the product: every value of every column many times, in mixtures that a generator draws."""
    numbers = generator(11)
    columns = (P, G, SIGNED, SECOND, EMA, PLACES, CLIPS, [True, False], NAMES)
    count = 3 * max(map(len, columns))
    drawn = []
    for column in columns:
        order = torch.cat([torch.randperm(len(column), generator=numbers) for _ in range(-(-count // len(column)))])
        drawn.append([column[i] for i in order[:count]])
    return [Case(*row) for row in zip(*drawn, strict=True)]


CASES = cases()


def item_of(case: Case, values: Tensor, numbers: torch.Generator, wide: bool = False) -> Item:
    """An item of one case whose operands hold like numbers as `values`, its rows and keys those of the first step."""
    rule = RULE[case.rule]
    states = [case.second if name in rule.positive else case.first for name in rule.state]
    codecs = [case.p, case.g, *states, *([] if case.ema is None else [case.ema])]
    if wide:
        codecs = [NUMBER["f64"]] * len(codecs)
    shape, kept = values.shape, []
    for operand, number in enumerate(codecs):
        main, extra = arrays(number, shape)
        mine = values[torch.randperm(len(values), generator=numbers)] if operand else values
        name = rule.state[operand - 2] if 2 <= operand < 2 + len(rule.state) else ""
        mine = mine.abs() if name in rule.positive else mine
        encode(number, mine.to(F64) if wide else mine, main, extra, bits_drawn(len(mine), numbers) if number & STOCHASTIC else None)
        kept.append(Arrays(main, extra))
    row = (0.7, *trace(rule).row(1, {name: HYPER[name] for name in rule.hyperparameters}), case.clip, 0.9, 0.1)
    mains, extras = zip(*kept, strict=True)
    return Item(case.rule, rule, tuple(mains), row, torch.tensor(0.0), tuple(codecs), tuple(extras), case.zero, 0, case.place)


def copy(item: Item) -> Item:
    return replace(item, tensors=tuple(tensor.clone() for tensor in item.tensors), counter=item.counter.clone(),
                   extras=tuple(None if extra is None else extra.clone() for extra in item.extras))


def steps(item: Item, backend: object, gradients: list[Tensor]) -> None:
    for step, gradient in enumerate(gradients):
        item.tensors[1].copy_(gradient)
        backend.step([replace(item, key=parameter_key(step_key(3, step), 9))])


def assert_same_item(got: Item, wanted: Item, what: str) -> None:
    for operand, (one, other) in enumerate(zip((*got.tensors, *got.extras, got.counter), (*wanted.tensors, *wanted.extras, wanted.counter),
                                               strict=True)):
        if other is None:
            assert one is None
        elif other.element_size() == 1:
            assert_same_bits(one.view(torch.uint8), other.view(torch.uint8), f"{what}: array {operand}")
        else:
            assert_same_bits(one, other, f"{what}: array {operand}")


def mixed(size: int, numbers: torch.Generator) -> Tensor:
    return normal((size,), F32, numbers) * 10.0 ** torch.randint(-6, 2, (size,), generator=numbers)


def check_case(case: Case, values: Tensor, gradients: list[Tensor], numbers: torch.Generator, wide: bool = False) -> Item:
    wanted = item_of(case, values, numbers, wide)
    got = copy(wanted)
    steps(wanted, reference, gradients)
    steps(got, native, gradients)
    assert_same_item(got, wanted, f"{case}, {len(values)} elements")
    return got


@pytest.mark.parametrize("part", range(6))
def test_steps(part: int) -> None:
    numbers = generator(20 + part)
    for index in range(part, len(CASES), 6):
        for size in (SIZES[index % len(SIZES)], SIZES[(index * 5 + 3) % len(SIZES)], 1100):
            check_case(CASES[index], mixed(size, numbers), [mixed(size, numbers) for _ in range(3)], numbers)


@pytest.mark.parametrize("part", range(3))
def test_steps_of_special_values(part: int) -> None:
    """NaN, infinities, zeros, denormal and huge numbers in p, g and states, each block a few of them."""
    numbers = generator(30 + part)
    special = torch.tensor(specials(F32))
    finite = special[special.isfinite()]
    for case in CASES[part::3]:
        values = torch.cat([special, finite[torch.randint(len(finite), (1000,), generator=numbers)], special])
        check_case(case, values, [values[torch.randperm(len(values), generator=numbers)] for _ in range(2)], numbers)


def test_steps_of_doubles() -> None:
    numbers = generator(40)
    for rule in NAMES:
        for ema in (None, 1):
            case = Case(1, 1, 1, 1, ema, (0, 0, 0), 0.5 if ema else math.inf, ema is None, rule)
            values = torch.cat([mixed(1000, numbers), torch.tensor(specials(F64))])
            check_case(case, values, [values.flip(0), values], numbers, wide=True)


def many_items(numbers: torch.Generator) -> list[Item]:
    return [item_of(CASES[i % len(CASES)], mixed(size, numbers), numbers)
            for i, size in enumerate([70_001, 3, 600, 140_000, 1, 0, 256, 33_333])]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads: int) -> None:
    wanted = many_items(generator(50))
    got = [copy(item) for item in wanted]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        native.step(got)
    finally:
        torch.set_num_threads(before)
    reference.step(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert_same_item(one, other, f"{threads} threads")


PROCESS = """
import test_storage
for test in (lambda: [test_storage.test_steps(part) for part in (0, 3)], lambda: test_storage.test_steps_of_special_values(0),
             lambda: [test_storage.test_codecs(number) for number in (*test_storage.ALONE, *test_storage.BLOCKS)],
             lambda: test_storage.test_threads(2)):
    test()
from fasttrain.kernels import native
print("isa", native.module().isa())
"""


@pytest.mark.parametrize("isa", [isa for isa in native.build_info().get("isas", []) if isa != "avx512"])
def test_instruction_sets(isa: str) -> None:
    done = python(PROCESS, timeout=600, FASTTRAIN_ISA=isa)
    if "this processor lacks it" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"isa {isa}")
