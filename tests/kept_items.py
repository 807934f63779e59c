"""Items that are not plain, for tests: their arrays, a list of combinations of codecs, and comparisons."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from helpers import assert_same_bits, generator, normal
from torch import Tensor

from fasttrain.kernels.item import Item
from fasttrain.kernels.trace import trace
from fasttrain.optim import RULES
from fasttrain.precision.codecs import CODECS, NUMBER, POSITIVE, STOCHASTIC, array_shapes, code_dtype, codec, encode
from fasttrain.precision.draws import parameter_key, step_key

F32, F64 = torch.float32, torch.float64
RULE = {rule.name: rule for rule in RULES}
HYPER = dict(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, momentum=0.9, dampening=0.1)
FLAGS = (0, POSITIVE, STOCHASTIC, POSITIVE + STOCHASTIC)
BLOCKS = [kept.number + flags for kept in CODECS if kept.block for flags in FLAGS]
ALONE = [number for number in range(10) if number != NUMBER["f64"]] + [2 + STOCHASTIC, 3 + STOCHASTIC]
SIZES = [0, 1, 2, 3, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1500]


def name_of(number: int) -> str:
    flags = [name for name, flag in (("positive", POSITIVE), ("stochastic", STOCHASTIC)) if number & flag]
    return " ".join([codec(number).name, *flags])


class Arrays(NamedTuple):
    main: Tensor
    extra: Tensor | None


def arrays(number: int, shape: torch.Size) -> Arrays:
    """Both arrays, full of rubbish: an element that is not written shows."""
    main, extra = array_shapes(number, shape)
    return Arrays(_rubbish(main, code_dtype(number)), None if extra is None else _rubbish(extra, codec(number).extra))


def _rubbish(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full((math.prod(shape) * dtype.itemsize,), 0x5A, dtype=torch.uint8).view(dtype).view(shape)


def bits_drawn(count: int, numbers: torch.Generator) -> Tensor:
    return torch.randint(0, 2**32, (count,), generator=numbers)


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
    count = 8 * max(map(len, columns))
    drawn = []
    for column in columns:
        order = torch.cat([torch.randperm(len(column), generator=numbers) for _ in range(-(-count // len(column)))])
        drawn.append([column[i] for i in order[:count]])
    return [Case(*row) for row in zip(*drawn, strict=True)]


CASES = cases()
ADAM = Case(NUMBER["split16"], NUMBER["bf16"], NUMBER["int8"], NUMBER["int8"] + POSITIVE + STOCHASTIC, None, (0, 0, 0),
            math.inf, False, "AdamW")


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
        draws = bits_drawn(len(mine), numbers) if number & STOCHASTIC else None
        encode(number, mine.to(F64) if wide else mine, main, extra, draws)
        kept.append(Arrays(main, extra))
    row = (0.7, *trace(rule).row(1, {name: HYPER[name] for name in rule.hyperparameters}), case.clip, 0.9, 0.1)
    mains, extras = zip(*kept, strict=True)
    return Item(case.rule, rule, mains, row, torch.tensor(0.0), tuple(codecs), extras, case.zero, 0, case.place)


def assert_same_array(got: Tensor | None, wanted: Tensor | None, what: str) -> None:
    """Also of codes, as integers."""
    assert (got is None) == (wanted is None), what
    if got is not None and wanted is not None:
        one_byte = wanted.element_size() == 1
        assert_same_bits(*((t.view(torch.uint8) if one_byte else t) for t in (got, wanted)), what)


def copy(item: Item) -> Item:
    return replace(item, tensors=tuple(tensor.clone() for tensor in item.tensors), counter=item.counter.clone(),
                   extras=tuple(None if extra is None else extra.clone() for extra in item.extras))


def steps(item: Item, backend: Any, gradients: list[Tensor]) -> None:
    for step, gradient in enumerate(gradients):
        item.tensors[1].copy_(gradient)
        backend.step([replace(item, key=parameter_key(step_key(3, step), 9))])


def assert_same_item(got: Item, wanted: Item, what: str) -> None:
    ends = ((*item.tensors, *item.extras, item.counter) for item in (got, wanted))
    for operand, (one, other) in enumerate(zip(*ends, strict=True)):
        assert_same_array(one, other, f"{what}: array {operand}")


def mixed(size: int, numbers: torch.Generator) -> Tensor:
    return normal((size,), F32, numbers) * 10.0 ** torch.randint(-6, 2, (size,), generator=numbers)
