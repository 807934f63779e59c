"""What steps that a device drives have in common (`fasttrain.kernels.driven`): launches, and the memory of their rows.

Items that one launch can step, and whose rows one computation makes, are a `Group`. Its rows are made in device memory
of their own, with a skip flag for each. Where items draw, every item has a row of its own: that of its group and then
its keys, which a second kernel writes, so that steps that the host drives pay nothing for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fasttrain.kernels import kept_table, prologue, table
from fasttrain.kernels.item import Item
from fasttrain.kernels.prologue import FIXED as FIXED
from fasttrain.kernels.prologue import KINDS, Row
from fasttrain.kernels.table import ALIGNED, Kind
from fasttrain.kernels.trace_scalars import ScalarGraph, hyperparameters, structure, trace_scalars
from fasttrain.precision.draws import GOLDEN, LONG, mix
from fasttrain.rule import Rule

Shape = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class Group:
    """Items of one launch.

    Attributes:
        places: which items they are.
        graph: makes their rows.
        rows: which of the rows, distinct.
        row_of: for each item, the row of the table that the kernel reads: one of `rows`, or the item's own if it draws.
        random: the operands that draw.
    """

    kind: Kind
    items: list[Item]
    places: list[int]
    graph: ScalarGraph
    rows: list[int]
    own_row: list[int]  # for each item, one of `rows`

    @property
    def rule(self) -> Rule:
        return self.kind.rule

    @property
    def random(self) -> list[int]:
        return [] if self.wide else kept_table.random_operands(self.kind.codecs)

    @property
    def row_of(self) -> list[int]:
        return list(range(len(self.items))) if self.random else self.own_row

    @property
    def wide(self) -> bool:
        return self.items[0].dtype == torch.float64

    @property
    def width(self) -> int:
        """Numbers of a row that the prologue makes."""
        return prologue.width(self.graph, not self.items[0].plain)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.wide else torch.float32


def grouped(items: Sequence[Item], rows: Sequence[Row], row_of: Sequence[int]) -> list[Group]:
    """The launches over the items, in the order of their first."""
    found: dict[tuple[Kind, Shape], list[int]] = {}
    for place, (item, row) in enumerate(zip(items, row_of, strict=True)):
        kind = Kind(item.rule, tuple(tensor.dtype for tensor in item.tensors), item.tensors[0].device, item.codecs)
        found.setdefault((kind, shape_of(item.rule, rows[row])), []).append(place)
    groups = []
    for (kind, _), places in found.items():
        own = list(dict.fromkeys(row_of[place] for place in places))
        index = {row: number for number, row in enumerate(own)}
        groups.append(Group(kind, [items[place] for place in places], places,
                            trace_scalars(kind.rule, rows[own[0]].hyperparameters), own,
                            [index[row_of[place]] for place in places]))
    return groups


def shape_of(rule: Rule, row: Row) -> Shape:
    """What the coefficients of a row are traced for."""
    return structure(hyperparameters(rule, row.hyperparameters))


def words(groups: Sequence[Group], rows: Sequence[Row], device: torch.device) -> list[np.ndarray]:
    """The numbers of each group's rows (`fasttrain.kernels.prologue.words`).

    Raises:
        ValueError: a row is of another structure than its group was made for.
    """
    for group in groups:
        for row in group.rows:
            if shape_of(group.rule, rows[row]) != group.graph.structure:
                raise ValueError(f"the hyperparameters of row {row} are of another structure than those that the step "
                                 f"of {group.rule.name} was made for: make it again")
    return [prologue.words(group.graph, [rows[row] for row in group.rows], device) for group in groups]


# --- Memory that a step writes ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Made:
    """Where the rows of a group are made, in bytes from the start of the memory of all.

    Attributes:
        rows, skip: what the prologue makes.
        own_rows, own_skip: what the step reads: the same, or rows with keys.
        own_width: numbers of a row that the step reads.
    """

    rows: int
    skip: int
    own_rows: int
    own_skip: int
    own_width: int


def laid_out(groups: Sequence[Group]) -> tuple[list[Made], int]:
    """Where each group's rows are made, and the bytes of all."""
    end = 0

    def take(size: int) -> int:
        nonlocal end
        begin, end = end, end + -(-size // ALIGNED) * ALIGNED
        return begin

    made = []
    for group in groups:
        size = group.dtype.itemsize
        rows, skip = take(len(group.rows) * group.width * size), take(len(group.rows) * 4)
        width = group.width + 2 * len(group.random)
        drawing = len(group.items) if group.random else 0
        made.append(Made(rows, skip, take(drawing * width * size) if drawing else rows,
                         take(drawing * 4) if drawing else skip, width))
    return made, end


def keyed(groups: Sequence[Group], made: Sequence[Made], base: int, rows: Sequence[Row]) -> np.ndarray:
    """What the kernel `keyed` is told of each item that draws (csrc/cuda/driven.cuh), int64 of shape (items, 9).

    Raises:
        ValueError: an item draws, and its row says from what count of draws not.
    """
    table = []
    for group, at in zip(groups, made, strict=True):
        mask = sum(1 << operand for operand in group.random)
        for number, (item, own) in enumerate(zip(group.items if mask else [], group.own_row, strict=False)):
            row = rows[group.rows[own]]
            if row.draws is None or row.draws.dtype != torch.int64:
                raise ValueError(f"{item.name} is rounded at random, and its row has as the count of draws "
                                 f"{row.draws!r}: give an int64 tensor on the device")
            table.append((base + at.rows + own * 4 * group.width, base + at.skip + 4 * own,
                          base + at.own_rows + number * 4 * at.own_width, base + at.own_skip + 4 * number,
                          row.draws.data_ptr(), group.width, _signed(mix(row.seed & LONG)),
                          _signed(mix((item.key + GOLDEN) & LONG)), mask))
    return np.array(table, np.int64).reshape(-1, 9)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def counts(groups: Sequence[Group], made: Sequence[Made], base: int, rows: Sequence[Row],
           counted: frozenset[int] = frozenset()) -> np.ndarray:
    """What the kernel `count` is told of each counter and count of draws, int64 of shape (counts, 3).

    Arguments:
        counted: addresses of those that others count.

    Raises:
        TypeError: a counter is of a type that is not counted with.
    """
    known: dict[int, tuple[int, int, int]] = {}
    for group, at in zip(groups, made, strict=True):
        for item, own in zip(group.items, group.own_row, strict=True):
            for counter in (item.counter, rows[group.rows[own]].draws):
                if counter is None or counter.data_ptr() in counted:
                    continue
                if counter.dtype not in KINDS or counter.dtype == torch.bool:
                    raise TypeError(f"the step count of {item.name} is a tensor of {counter.dtype}: a device counts in "
                                    "float32, float64, int32 or int64")
                known.setdefault(counter.data_ptr(), (counter.data_ptr(), base + at.skip + 4 * own,
                                                      KINDS.index(counter.dtype)))
    return np.array(list(known.values()), np.int64).reshape(-1, 3)


# --- Chunks -----------------------------------------------------------------------------------------------------------

def described(group: Group, items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """What the chunk table of a group is made from, without the addresses of gradients; and these."""
    kind = table if items[0].plain else kept_table
    made = kind.describe(items, group.row_of)
    moving = made[:, 1].copy()
    made[:, 1] = 0
    return made, moving
