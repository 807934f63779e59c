"""Items that are not plain, for the tests of the backends: made of random values, and compared with the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from helpers import assert_same_bits, normal
from torch import Tensor

from fasttrain.kernels import reference
from fasttrain.kernels.item import Item
from fasttrain.kernels.trace import trace
from fasttrain.optim import RULES
from fasttrain.precision.codecs import NUMBER, POSITIVE, STOCHASTIC, array_shapes, code_dtype, codec, decode, encode
from fasttrain.rule import Rule

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
            if got_extra is not None and expected_extra is not None:
                assert_same_bits(raw(got_extra), raw(expected_extra), f"{what}, {item.name}, second array of {name}")
        if item.counter is not None and right.counter is not None:
            assert_same_bits(item.counter, right.counter, f"{what}, {item.name}, counter")


def new_gradients(items: Sequence[Item], numbers: torch.Generator) -> None:
    """Other values where the gradients are."""
    for item in items:
        g = item.tensors[1]
        g.copy_(normal(g.shape, torch.float64, numbers))


def state_values(item: Item) -> list[Tensor]:
    """What the states hold."""
    count = item.tensors[0].numel()
    return [decode(one, main, extra, count) for one, main, extra in
            zip(item.codecs[2:], item.tensors[2:], item.extras[2:], strict=True)]


def rules_with(states: int) -> list[Rule]:
    """The rules of so many states."""
    return [rule for rule in RULES if len(rule.state) == states]
