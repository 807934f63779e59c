"""Items that are not plain, for the tests of the backends: made of random values, and compared with the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from helpers import assert_same_bits, generator, normal
from torch import Tensor

from fasttrain.kernels import reference
from fasttrain.kernels.item import Item
from fasttrain.kernels.trace import trace
from fasttrain.optim import RULES
from fasttrain.precision.codecs import NUMBER, POSITIVE, STOCHASTIC, array_shapes, code_dtype, codec, encode

BY_NAME = {rule.name: rule for rule in RULES}
OPTIONS = dict(lr=0.03, betas=(0.83, 0.97), eps=1e-6, weight_decay=0.04, momentum=0.8, dampening=0.3)
SHARD = (12_345_678_901, 300, 1_000)  # columns of a matrix: runs that no block knows of


def number(name: str) -> int:
    """The number of a codec as these tests write it: the base's name, then +P for positive, +S for stochastic."""
    base, *flags = name.split("+")
    return NUMBER[base] + sum({"P": POSITIVE, "S": STOCHASTIC}[flag] for flag in flags)


def numbers_of(names: str) -> tuple[int, ...]:
    """The codecs of p, g, the states and the EMA, from names with blanks between."""
    return tuple(number(name) for name in names.split())


@dataclass(frozen=True)
class Case:
    """A rule and how its operands are kept; one codec more than the rule has operands is the EMA's."""

    rule: str
    codecs: str
    zero: bool = False
    clip: float = math.inf
    place: tuple[int, int, int] = (0, 0, 0)

    def __str__(self) -> str:
        return f"{self.rule}-{self.codecs.replace(' ', '-')}"

    def row(self, step: int, scale: float) -> list[float]:
        return [scale, *trace(BY_NAME[self.rule]).row(step, OPTIONS), self.clip, 0.99, 0.01]

    def item(self, values: Sequence[Tensor], step: int = 1, scale: float = 0.5, key: int = 0,
             offsets: Sequence[int] = (0,)) -> Item:
        """An item whose operands hold values (fp32 or fp64, flat).

        Arguments:
            offsets: for each operand in turn, elements between an address that is a multiple of 64 bytes and its
                first array.
        """
        codecs = numbers_of(self.codecs)
        pairs = [keep(one, value, offsets[i % len(offsets)]) for i, (one, value) in
                 enumerate(zip(codecs, values, strict=True))]
        return Item(f"size {values[0].numel()}", BY_NAME[self.rule], tuple(main for main, _ in pairs),
                    self.row(step, scale), torch.zeros(()), codecs, tuple(extra for _, extra in pairs), self.zero, key,
                    self.place)

    @classmethod
    def of(cls, rule: str, p: str, g: str, signed: str, positive: str, average: str = "", **more) -> Case:
        """A case whose states are all kept in one of two ways, by whether they have signs; no average if it is ""."""
        kept_so = [positive if name in BY_NAME[rule].positive else signed for name in BY_NAME[rule].state]
        return cls(rule, " ".join((p, g, *kept_so, average)).strip(), **more)

    def like(self, values: Tensor, numbers: torch.Generator) -> Item:
        """An item whose parameter holds the values, and every other operand the same in another order."""
        rule, made = BY_NAME[self.rule], [values]
        for name in ("gradient", *rule.state, "average")[: len(numbers_of(self.codecs)) - 1]:
            mixed = values[torch.randperm(len(values), generator=numbers)]
            made.append(mixed.abs() if name in rule.positive else mixed)
        return self.item(made)

    def random(self, size: int, numbers: torch.Generator, **more) -> Item:
        """An item with random values, of blocks that differ in magnitude."""
        made = []
        for one in numbers_of(self.codecs):
            value = normal((size,), torch.float64, numbers)
            value *= 10.0 ** normal((-(-size // 64),), torch.float64, numbers).repeat_interleave(64)[:size]
            made.append(value.abs() if one & POSITIVE else value)
        for name, value in zip(BY_NAME[self.rule].state, made[2:], strict=False):
            if name.endswith("sq"):
                value.abs_()
        return self.item(made, **more)


def placed(shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> Tensor:
    """Zeros `offset` elements past a multiple of 64 bytes."""
    count = math.prod(shape)
    return torch.zeros(count + offset, dtype=dtype)[offset:].view(shape)


def keep(one: int, value: Tensor, offset: int = 0) -> tuple[Tensor, Tensor | None]:
    """Both arrays of an operand that holds the values."""
    value = value if codec(one).name == "f64" else value.float()
    main_shape, extra_shape = array_shapes(one, value.shape)
    main = placed(main_shape, code_dtype(one), offset)
    beside = codec(one).extra
    extra = None if extra_shape is None or beside is None else placed(extra_shape, beside, 0)
    draws = torch.full(value.shape, 0x6789ABCD) if one & STOCHASTIC else None
    encode(one, value, main, extra, draws)
    return main, extra


def copied(items: Sequence[Item]) -> list[Item]:
    """The same items in memory of their own."""
    return [replace(item, tensors=tuple(tensor.clone() for tensor in item.tensors),
                    extras=tuple(extra if extra is None else extra.clone() for extra in item.extras),
                    counter=None if item.counter is None else item.counter.clone()) for item in items]


def oracle(items: Sequence[Item]) -> list[Item]:
    """The items as the reference leaves them; they themselves are not touched."""
    wanted = copied(items)
    reference.step(wanted)
    return wanted


def raw(tensor: Tensor) -> Tensor:
    """8-bit floats as bytes: every bit of a code counts, and torch compares few of them."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def compare(items: Sequence[Item], wanted: Sequence[Item], what: str) -> None:
    """Fail unless every array and counter is the same."""
    for item, right in zip(items, wanted, strict=True):
        names = ["p", "g", *item.rule.state, "average"]
        for name, got, expected in zip(names, item.tensors, right.tensors, strict=False):
            assert_same_bits(raw(got), raw(expected), f"{what}, {item.name}, {name}")
        for name, got_extra, expected_extra in zip(names, item.extras, right.extras, strict=False):
            assert (got_extra is None) == (expected_extra is None), f"{what}, {item.name}, second array of {name}"
            if got_extra is not None and expected_extra is not None:
                assert_same_bits(raw(got_extra), raw(expected_extra), f"{what}, {item.name}, second array of {name}")
        if item.counter is not None and right.counter is not None:
            assert_same_bits(item.counter, right.counter, f"{what}, {item.name}, counter")


def new_gradients(items: Sequence[Item], numbers: torch.Generator) -> None:
    """Other values where the gradients are."""
    for item in items:
        g = item.tensors[1]
        g.copy_(normal(g.shape, torch.float64, numbers))


# --- Lists of cases ---------------------------------------------------------------------------------------------------

PARAMS = ("f32", "bf16", "f16", "bf16+S", "f16+S", "split16", "split8", "master_bf16", "master_f16", "kahan_bf16",
          "kahan_f16")
GRADS = ("f32", "bf16", "f16")
BLOCKS = [base + flags for base in ("int8", "e4m3", "e5m2", "int4") for flags in ("", "+P", "+S", "+P+S")]
STATES = ("f32", "f64", "bf16", "bf16+S", "f16", "f16+S", *BLOCKS)
AVERAGES = ("", "f32", "bf16+S", "f16+S")
SIGNED = ("f32", "bf16", "bf16+S", "f16+S", *(name for name in BLOCKS if "+P" not in name))
UNSIGNED = ("f32", "bf16+S", "f16", *(name for name in BLOCKS if "+P" in name))
PLACES = ((0, 0, 0), (7, 0, 0), ((1 << 32) - 300, 0, 0), (5, 100, 1000), ((1 << 33) - 9, 7, (1 << 32) + 1))
CLIPS = (math.inf, 0.5, 0.0)
MIXED = ("AdamW", "SGDMomentum", "Lion", "AdamWAmsgrad", "SGD")  # rules


def mixtures() -> list[Case]:
    """With every rule, every codec in every place and everything else of an item, in mixtures that a generator draws:
    for backends that are quick.
    """
    numbers, cases, count = generator(11), [], 20
    columns = (PARAMS, GRADS, SIGNED, UNSIGNED, AVERAGES, PLACES, CLIPS, (True, False))
    for rule in MIXED:
        drawn = []
        for column in columns:
            orders = [torch.randperm(len(column), generator=numbers) for _ in range(-(-count // len(column)))]
            drawn.append([column[i] for i in torch.cat(orders)[:count]])
        cases += [Case.of(rule, *codecs, place=place, clip=clip, zero=zero)
                  for *codecs, place, clip, zero in zip(*drawn, strict=True)]
    return cases


def some_cases() -> list[Case]:
    """Every codec in every place, with everything else of an item in turn; and items computed in float64: for backends
    that are slow.
    """
    cases = []
    for i in range(len(STATES)):
        second, average = STATES[(7 * i + 3) % len(STATES)], AVERAGES[i // 2 % 4]
        codecs = [PARAMS[i % len(PARAMS)], GRADS[i % 3], STATES[i], second, average]
        cases.append(Case("AdamW", " ".join(codecs).strip(), zero=i % 3 == 0, clip=0.4 if i % 4 < 2 else math.inf,
                          place=SHARD if i % 5 < 2 else (0, 0, 0)))
    return [*cases, Case("SGD", "split16 bf16"), Case("SGD", "f32 f16 f32", zero=True),
            Case("SGDNesterov", "split8 f16 int4+S", clip=0.1), Case("Lion", "bf16+S bf16 int8"),
            Case("AdamWAmsgrad", "kahan_bf16 bf16 int8 int8+P int8+P"),
            Case("AdamW", "f64 f64 f64 f64 f64", zero=True, clip=0.3), Case("AdamW", "f64 f32 f32 bf16")]


def all_pairs() -> list[Case]:
    """Every way to keep a parameter with every way to keep a state."""
    return [Case("AdamW", f"{p} {GRADS[(i + j) % 3]} {s} {STATES[-1 - j]}", clip=1.0, place=SHARD)
            for i, p in enumerate(PARAMS) for j, s in enumerate(STATES)]


def difficult() -> Tensor:
    """fp32 values by their bits: in blocks of 256, such as have one exponent, few exponents, denormals, zeros of both
    signs, one outlier, ties of 16-bit formats, infinities and NaN.
    """
    numbers = torch.Generator().manual_seed(5)

    def patterns(low: int, high: int, count: int = 256) -> Tensor:
        sign = torch.randint(0, 2, (count,), generator=numbers) << 31
        bits = sign | torch.randint(low, high, (count,), generator=numbers)
        return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)

    inf, one = 0x7F800000, 0x3F800000
    outlier, mixed = patterns(one, one + (1 << 23)) * 2.0**-20, patterns(0, inf)
    outlier[17] = 3e38
    broken = patterns(0, inf)
    broken[3] = math.inf
    ties = (patterns(0, inf).view(torch.int32) & ~0xFFFF | 0x8000).view(torch.float32)
    halves = (patterns(one - (20 << 23), one).view(torch.int32) & ~0x1FFF | 0x1000).view(torch.float32)
    levels = torch.arange(-127, 129).clamp(max=127)
    squares = (levels * levels.abs()).float()  # every code exactly, and the midpoints of codes
    midpoints = (levels.abs() - 0.5).square() * torch.where(levels < 0, -1.0, 1.0)
    midpoints[0] = 127.0**2
    beside = [(midpoints.view(torch.int32) + shift).view(torch.float32) for shift in (-1, 1)]
    for values in beside:
        values[0] = 127.0**2
    ramp = torch.arange(256) / 255
    parts = [patterns(0, 1 << 31, 2048), mixed, patterns(1, 1 << 23), patterns(0, 1), outlier, broken, ties, halves,
             patterns(one, one + 1), patterns(one - (16 << 23), one + (1 << 23)), squares, midpoints,
             *beside, midpoints * 2.0**60, ramp * 2.0 ** (-torch.arange(256) // 8), patterns(inf - (1 << 23), inf),
             patterns(1 << 23, 3 << 23), patterns(inf + 1, inf + (1 << 23))[:100], patterns(0, inf)[:77]]
    return torch.cat(parts)


def difficult_parameter(p: str, average: str = "") -> Item:
    """An item whose new parameter is `difficult()`: p - lr * g, with p = -0.0 and lr = -1. The EMA becomes it too."""
    values = difficult()
    zeros = torch.full(values.shape, -0.0)
    case = Case("SGD", f"{p} f32 {average}".strip())
    made = case.item([zeros, values] + [zeros] * bool(average), key=77)
    return replace(made, row=[1.0, -1.0, math.inf, 0.0, 1.0], place=(1 << 33, 0, 0))


def difficult_state(state: str) -> Item:
    """An item whose new state is `difficult()`: keep * state + add * g, with state = 0."""
    assert trace(BY_NAME["SGDMomentum"]).coefficients == ["keep", "add", "lr"]
    new = difficult()
    values = [torch.ones_like(new), new, torch.zeros_like(new)]
    made = Case("SGDMomentum", f"f32 f32 {state}").item(values, key=78)
    return replace(made, row=[1.0, 1.0, 1.0, 0.5, math.inf, 1.0, 0.0])
