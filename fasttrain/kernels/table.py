"""The chunk table: what a GPU kernel reads to find its work, one row of 64-bit words for each chunk of a tensor.

=======================  =====================================================================
columns                  meaning
=======================  =====================================================================
0 ... streams - 1        addresses of the chunk's first element: p, g, then the rule's states
streams                  elements in the chunk
streams + 1              the chunk's row in the table of coefficients
streams + 2              1 if all its addresses are multiples of 16 bytes, else 0
=======================  =====================================================================
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from fasttrain.kernels.item import Item
from fasttrain.rule import Rule

ALIGNED = 16  # bytes: the widest access of one GPU thread


class Kind(NamedTuple):
    """What items have in common that one launch can step together."""

    rule: Rule
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    codecs: tuple[int, ...] = ()  # empty: plain items


def grouped(items: Sequence[Item]) -> dict[Kind, list[Item]]:
    """The items that one launch can step together: those of one rule, the same storages and one device."""
    groups: dict[Kind, list[Item]] = {}
    for item in items:
        dtypes = tuple(tensor.dtype for tensor in item.tensors)
        groups.setdefault(Kind(item.rule, dtypes, item.tensors[0].device, item.codecs), []).append(item)
    return groups


def coefficient_rows(items: Sequence[Item]) -> tuple[np.ndarray, list[int]]:
    """The distinct coefficient rows of items of one rule, in double precision, and the index of each item's row.

    Example:
        >>> import torch
        >>> from fasttrain.optim import SGD
        >>> p, g = torch.ones(2), torch.ones(2)
        >>> rows, row_of = coefficient_rows([Item(str(lr), SGD.rules[0], (p, g), (1.0, lr), None) for lr in (3, 5, 3)])
        >>> rows.tolist(), row_of
        ([[1.0, 3.0], [1.0, 5.0]], [0, 1, 0])
    """
    known: dict[bytes, int] = {}  # by bits: 0.0 == -0.0, and NaN != NaN
    row_of = [known.setdefault(struct.pack(f"{len(item.row)}d", *item.row), len(known)) for item in items]
    if not known:
        return np.empty((0, 0)), row_of
    return np.frombuffer(b"".join(known)).reshape(len(known), -1), row_of


def rows(items: Sequence[Item]) -> tuple[np.ndarray, list[int]]:
    """The distinct rows in the type that they are computed in, and the index of each item's row."""
    doubles, row_of = coefficient_rows(items)
    return doubles.astype(np.float64 if items[0].dtype == torch.float64 else np.float32), row_of


def describe(items: Sequence[Item], row_of: Sequence[int] | None = None) -> np.ndarray:
    """What the table is made from, one row for each item: addresses, elements, coefficient row. The table of two lists
    of items is the same if this and the storages are.
    """
    rows = coefficient_rows(items)[1] if row_of is None else row_of
    return np.array([[*(tensor.data_ptr() for tensor in item.tensors), item.tensors[0].numel(), row]
                     for item, row in zip(items, rows, strict=True)], np.int64)


def build(items: Sequence[Item], chunk: int, described: np.ndarray | None = None) -> np.ndarray:
    """The table of items that are dense, of one rule and of the same storages (`grouped`), as int64.

    Arguments:
        items: what is stepped; an item without elements has no chunk.
        chunk: elements of one chunk at most; a multiple of 16, so that a chunk is aligned as its tensor is, and below
            2^30, so that kernels count in 32 bits.
        described: `describe(items)`, if the caller has it.

    Returns:
        An array of shape (chunks, streams + 3).

    Raises:
        ValueError: `chunk` is not such a number.

    Example:
        >>> import torch
        >>> from fasttrain.optim import SGD
        >>> item = Item("w", SGD.rules[0], (torch.ones(40), torch.ones(40)), (1.0, 0.1), None)
        >>> build([item], chunk=32)[:, 2:4].tolist()  # elements, and the row
        [[32, 0], [8, 0]]
    """
    if not 0 < chunk < 1 << 30 or chunk % ALIGNED:
        raise ValueError(f"chunk is {chunk}: give a positive multiple of {ALIGNED} below 2^30")
    if not items:
        return np.empty((0, 0), np.int64)
    if described is None:
        described = describe(items)
    streams = len(items[0].tensors)
    sizes = np.array([tensor.element_size() for tensor in items[0].tensors], np.int64)
    elements = described[:, streams]
    chunks = -(-elements // chunk)
    item_of = np.repeat(np.arange(len(items)), chunks)
    begin = (np.arange(len(item_of)) - (np.cumsum(chunks) - chunks)[item_of]) * chunk

    table = np.empty((len(item_of), streams + 3), np.int64)
    table[:, :streams] = described[item_of, :streams] + begin[:, None] * sizes
    table[:, streams] = np.minimum(elements[item_of] - begin, chunk)
    table[:, streams + 1] = described[item_of, streams + 1]
    table[:, streams + 2] = (table[:, :streams] % ALIGNED == 0).all(axis=1)
    return table
