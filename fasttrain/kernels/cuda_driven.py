"""Steps that a GPU drives, on CUDA (`fasttrain.kernels.driven`).

One launch makes every row, whatever the rule; one more those of items that draw, if there are any; one takes the
elements from chunks that are skipped; then there is one for each (rule, storage combination), and one that counts.
Items without a kernel here are driven by Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fasttrain.kernels import cuda, dispatch, kept_table
from fasttrain.kernels import driven_plan as plan
from fasttrain.kernels.driven_plan import Group
from fasttrain.kernels.driven_tables import Make, Tabled, together
from fasttrain.kernels.item import Item
from fasttrain.kernels.program import Addresses, described, program, with_slots
from fasttrain.kernels.prologue import Row
from fasttrain.kernels.resident import Resident, making

THREADS = 64  # of a block that makes rows


def kernel_of(item: Item) -> tuple[str | None, str]:
    """The kernel of an item, or None and why there is none."""
    if item.rule.sums is not None:
        return None, f"{item.rule.name}, a stage with sums, is driven in Triton"
    dtypes = tuple(tensor.dtype for tensor in item.tensors)
    name, reason = cuda.kernel_of(item.rule, dtypes, item.codecs, item.tensors[0].device)
    return name, f"{item.name} has no CUDA kernel ({reason})"


def why_not(items: Sequence[Item], rows: Sequence[Row], row_of: Sequence[int]) -> str | None:
    """As `fasttrain.kernels.driven.why_not`, of items on a GPU that CUDA has."""
    others = [place for place, item in enumerate(items) if kernel_of(item)[0] is None]
    if not others:
        return None
    first = items[others[0]]
    if (reason := dispatch.load("triton").why_not(first.tensors[0].device)) is None:
        reason = dispatch.part("triton_driven").why_not([items[place] for place in others], rows,
                                                        [row_of[place] for place in others])
    return reason and f"{kernel_of(first)[1]}, and in Triton: {reason}"


def driven(items: Sequence[Item], rows: Sequence[Row], row_of: Sequence[int]) -> Any:
    """As `fasttrain.kernels.driven.driven`."""
    known = [place for place, item in enumerate(items) if kernel_of(item)[0] is not None]
    others = sorted(set(range(len(items))) - set(known))
    parts: list[tuple[Sequence[int], Make]] = [(known, CudaDriven)] if known else []
    if others:
        parts += dispatch.part("triton_driven").parts(items, others)
    return together(items, rows, row_of, parts)


class CudaDriven(Tabled):
    """A step of CUDA kernels."""

    def __init__(self, items: Sequence[Item], rows: Sequence[Row], row_of: Sequence[int],
                 counted: frozenset[int] = frozenset()) -> None:
        place, self.code, processors = cuda.opened(items[0].tensors[0].device)

        def chunk_of(items: Sequence[Item]) -> int:
            return cuda.chunk_size(sum(item.tensors[0].numel() for item in items), processors)

        super().__init__(place, items, rows, row_of, chunk_of, lambda group: program(group.graph).words, slots,
                         counted)
        self.kernels = [str(kernel_of(group.items[0])[0]) for group in self.groups]
        tables = self.tables.fixed[len(self.groups) :]  # of counts, of rows
        with making("the tables of a step", self.device), place.guard():
            masks = np.concatenate([self._masks(index) for index in range(len(self.groups))])
            self.masks = Resident(place, [], [masks])
        self.small = [("prologue", tables[1], sum(len(group.rows) for group in self.groups)),
                      ("keyed", self.numbers.live[-1], len(self.keyed)),
                      ("chunks_left", self.masks.fixed[0], len(masks)), ("count", tables[0], len(self.counts))]
        for name in (*(name for name, _, count in self.small if count), *self.kernels):
            self.code.usage(name, cuda.THREADS)  # loaded now: nothing is in a capture
        self.launches = sum(len(chunks) > 0 for chunks in self.chunks) + sum(count > 0 for _, _, count in self.small)

    def more(self) -> list[np.ndarray]:
        rows = [described(Addresses(fixed, words, self.base + at.rows, self.base + at.skip), len(group.rows),
                          len(plan.FIXED) + len(group.graph.inputs), group.width, group.wide, not group.items[0].plain)
                for group, at, words, fixed in zip(self.groups, self.made, self.numbers.live, self.numbers.fixed,
                                                   strict=False)]
        return [with_slots(np.concatenate(rows), self.base + self.end)]

    def _masks(self, index: int) -> np.ndarray:
        """What the kernel `chunks_left` is told of the chunks of a group, int64 of shape (chunks, 5)."""
        group, chunks, made = self.groups[index], self.chunks[index], self.made[index]
        item, number = group.items[0], np.arange(len(chunks))
        column = len(item.tensors) + (0 if item.plain else len(kept_table.extra_operands(item.codecs)))
        zeroed = np.zeros(len(chunks), bool) if item.plain else (chunks[:, column + 2] & 2) != 0
        return np.stack([self.tables.fixed[index] + 8 * (number * chunks.shape[1] + column), chunks[:, column],
                         self.base + made.own_skip + 4 * chunks[:, column + 1],
                         np.where(zeroed, self.tables.live[index] + 8 * number, 0),
                         np.full(len(chunks), item.tensors[1].element_size())], axis=1)

    def make(self) -> None:
        for small in self.small[:3]:
            self._small(*small)

    def step(self) -> None:
        stream = self.place.stream()
        for index, (name, chunks, made) in enumerate(zip(self.kernels, self.chunks, self.made, strict=True)):
            if len(chunks):
                self.code.launch(kernel=name, blocks=len(chunks), threads=cuda.THREADS, stream=stream,
                                 table=self.tables.fixed[index], chunks=len(chunks), rows=self.base + made.own_rows,
                                 gradients=self.tables.live[index])

    def count(self) -> None:
        self._small(*self.small[3])

    def _small(self, name: str, table: int, rows: int) -> None:
        if rows:
            self.code.launch(kernel=name, blocks=-(-rows // THREADS), threads=THREADS, stream=self.place.stream(),
                             table=table, chunks=rows, rows=0, gradients=0)


def slots(groups: Sequence[Group]) -> int:
    """Bytes in which the rows of a launch are computed."""
    return 8 * sum(len(group.rows) for group in groups) * max(program(group.graph).slots for group in groups)
