"""Arrays of one codec, for tests: which codecs there are, rubbish to write over, and comparisons."""

import math
from typing import NamedTuple

import torch
from helpers import assert_same_bits
from torch import Tensor

from fasttrain.precision.codecs import CODECS, NUMBER, POSITIVE, STOCHASTIC, array_shapes, code_dtype, codec

F32, F64 = torch.float32, torch.float64
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


def assert_same_array(got: Tensor | None, wanted: Tensor | None, what: str) -> None:
    """Also of codes, as integers."""
    assert (got is None) == (wanted is None), what
    if got is not None and wanted is not None:
        one_byte = wanted.element_size() == 1
        assert_same_bits(*((t.view(torch.uint8) if one_byte else t) for t in (got, wanted)), what)
