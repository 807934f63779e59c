"""What a backend receives: one parameter to be stepped, and its tensors in an order that kernels can walk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fasttrain.rule import Rule

STORAGES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # as `Storage` in csrc/common.h


@dataclass(frozen=True, eq=False)
class Item:
    """One parameter in one step.

    Attributes:
        name: how errors call it.
        rule: its equation.
        tensors: p, g and the rule's states; real, of one shape and one device, p and the states are written.
        row: the gradient's scale, then the coefficients in the order of the traced rule.
        counter: the step count that the step increments, one element, or None.
    """

    name: str
    rule: Rule
    tensors: tuple[Tensor, ...]
    row: Sequence[float]
    counter: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the equation is computed: float64 for float64 parameters, else float32."""
        return torch.float64 if self.tensors[0].dtype == torch.float64 else torch.float32

    @property
    def written(self) -> list[Tensor]:
        return [self.tensors[0], *self.tensors[2:], *([] if self.counter is None else [self.counter])]


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
        if not walks_alike(item.tensors):
            copies = tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in item.tensors)
            copied.append((item, copies))
            item = replace(item, tensors=copies)
        walkable.append(item)
    yield walkable
    for item, copies in copied:
        for index, (tensor, copy) in enumerate(zip(item.tensors, copies, strict=True)):
            if index != 1:
                tensor.copy_(copy)


def table_of_rows(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """The rows as one array of doubles, shape (rows, longest row), padded with zeros."""
    table = np.zeros((len(rows), max(map(len, rows), default=1)))
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table
