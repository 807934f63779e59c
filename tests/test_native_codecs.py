"""Every codec alone, on the CPU backend: the oracle's bits, and what numerics.md promises of it."""

import math

import pytest
import torch
from coded import ALONE, BLOCKS, F32, SIZES, Arrays, arrays, assert_same_array, bits_drawn, name_of
from helpers import assert_same_bits, generator, needs_native, normal, specials
from torch import Tensor

from fasttrain.kernels import native
from fasttrain.precision.codecs import NUMBER, POSITIVE, STOCHASTIC, codec, decode, encode

pytestmark = needs_native


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
    what = f"{name_of(number)}, {what}"
    for one, other in zip(got, wanted, strict=True):
        assert_same_array(one, other, what)
    assert_same_bits(decoded(number, got, values.numel()), decode(number, *wanted, values.numel()), what)


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


# From zero; around one; up to the largest numbers, infinity and NaN: of both signs, each a 128th of all patterns.
NEAR = [sign | first for sign in (0, 1 << 31) for first in (0, 0x3F000000, 0x7E000000)]


@pytest.mark.parametrize("name", ["split16", "split8"])
def test_numbers_split(name: str) -> None:
    for first in NEAR:
        assert native.module().count_broken_splits(NUMBER[name], first, first + 2**25 - 1) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["split16", "split8"])
def test_all_numbers_split(name: str) -> None:
    """Contract 4: all 2^32 patterns."""
    for first in range(0, 2**32, 2**30):
        assert native.module().count_broken_splits(NUMBER[name], first, first + 2**30 - 1) == 0


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
