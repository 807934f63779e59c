"""What a backend receives: one parameter to be stepped, and its tensors in an order that kernels can walk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttrain.precision.codecs import STOCHASTIC, codec
from fasttrain.rule import Rule

STORAGES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # as `Storage` in csrc/common.h


class Tail(NamedTuple):
    """What a row says beyond scale and coefficients.

    Attributes:
        clip: the largest magnitude of an element of the scaled gradient; infinite: any.
        keep, add: new EMA = keep * EMA + add * new parameter.
    """

    clip: float = math.inf
    keep: float = 1.0
    add: float = 0.0


@dataclass(frozen=True, eq=False)
class Item:
    """One parameter in one step.

    A plain item is what torch's optimizers keep: tensors of one shape, each its own storage. One that is not plain
    names the codec of every operand, and its row ends with the numbers of `Tail`.

    Attributes:
        name: how errors call it.
        rule: its equation.
        tensors: p, g, the rule's states, and the EMA if there is one: of each the first array. Real, on one device;
            those of other than block codecs are of one shape. All but g are written.
        row: the gradient's scale, then the coefficients in the order of the traced rule, then the tail.
        counter: the step count that the step increments, one element, or None.
        codecs: numbers of `fasttrain.precision.codecs`, one for each of `tensors`; empty if the item is plain.
        extras: the second arrays, one or None for each of `tensors`; empty if the item is plain.
        zero: zero the gradient once it is read.
        key: of the parameter in this step (`fasttrain.precision.draws`), for stochastic codecs.
        place: where the local elements lie in the full parameter (`fasttrain.precision.draws.full_index`).
    """

    name: str
    rule: Rule
    tensors: tuple[Tensor, ...]
    row: Sequence[float]
    counter: Tensor | None
    codecs: tuple[int, ...] = ()
    extras: tuple[Tensor | None, ...] = ()
    zero: bool = False
    key: int = 0
    place: tuple[int, int, int] = (0, 0, 0)

    @property
    def plain(self) -> bool:
        return not self.codecs

    @property
    def averaged(self) -> bool:
        """Whether the last of `tensors` is an EMA of the parameter."""
        return len(self.tensors) == 3 + len(self.rule.state)

    @property
    def tail(self) -> Tail:
        """The end of the row of an item that is not plain."""
        return Tail(*self.row[-3:])

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the equation is computed: float64 for float64 parameters, else float32."""
        return torch.float64 if self.tensors[0].dtype == torch.float64 else torch.float32

    @property
    def written(self) -> list[Tensor]:
        """Every tensor that the step writes."""
        own = [self.tensors[0], *self.tensors[1 if self.zero else 2:], *self.extras, self.counter]
        return [tensor for tensor in own if tensor is not None]


def order(tensor: Tensor) -> tuple[tuple[int, int], ...] | None:
    """Sizes and strides of the dimensions that matter, or None if the elements do not fill one stretch of memory."""
    if tensor.numel() == 0:
        return ()
    dims = tuple((size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1)
    reach = 1
    for size, stride in sorted(dims, key=lambda dim: dim[1]):
        if stride != reach:
            return None
        reach *= size
    return dims


def overlaps(tensor: Tensor) -> bool:
    """Whether elements may share memory, so that a step cannot write them (an expanded view, for example)."""
    reach = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda dim: dim[1]):
        if size != 1 and stride < reach:
            return tensor.numel() > 0
        reach += (size - 1) * stride
    return False


def walks_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors are dense and of one order, so that one flat loop visits the same element of each."""
    first = order(tensors[0])
    return first is not None and all(order(tensor) == first for tensor in tensors[1:])


def flat(item: Item) -> bool:
    """Whether one flat loop can walk an item: its operands are of one order, and row-major where places count."""
    if item.plain:
        return walks_alike(item.tensors)
    arrays = [array for number, *pair in zip(item.codecs, item.tensors, item.extras, strict=True)
              if not codec(number).block for array in pair if array is not None]
    places_count = any(codec(number).block or number & STOCHASTIC for number in item.codecs)
    return walks_alike(arrays) and (arrays[0].is_contiguous() or not places_count)


def apart(items: Sequence[Item]) -> bool:
    """Whether no two tensors that are written lie over each other in memory (or in between each other)."""
    spans = []
    for item in items:
        for tensor in item.written:
            reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            if tensor.numel():
                spans.append((tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()))
    spans.sort()
    return all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def in_turns(items: Sequence[Item]) -> list[Sequence[Item]]:
    """The items in groups that can be stepped together: all at once, or one by one where they share memory."""
    return [items] if apart(items) else [[item] for item in items]


@contextmanager
def dense(items: Sequence[Item]) -> Iterator[list[Item]]:
    """The items with every strided or differently ordered tensor replaced by a contiguous copy, copied back at the end.

    Nearly always nothing is copied: autograd gives a gradient its parameter's layout, and states are made with it.
    """
    copied = []
    walkable = []
    for item in items:
        if not flat(item):
            original = item
            item = replace(item, tensors=tuple(_contiguous(tensor) for tensor in item.tensors),
                           extras=tuple(extra if extra is None else _contiguous(extra) for extra in item.extras))
            copied.append((original, item))
        walkable.append(item)
    yield walkable
    for original, copy in copied:
        for tensor, new in zip(original.written, copy.written, strict=True):
            if new is not tensor:
                tensor.copy_(new)


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def table_of_rows(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """The rows as one array of doubles, shape (rows, longest row), padded with zeros."""
    table = np.zeros((len(rows), max(map(len, rows), default=1)))
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table
