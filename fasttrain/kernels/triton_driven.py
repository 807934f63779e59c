"""Steps that a device drives, in Triton (`fasttrain.kernels.driven`), or in its interpreter.

One launch makes the rows of each computation of coefficients; one more those of items that draw, if there are any; then
there is one for each (rule, storages), one for all sums of stages, if there are any, and one that counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels import prologue, triton, triton_stages, triton_sums
from fasttrain.kernels.driven_tables import Make, Tabled, together
from fasttrain.kernels.item import STORAGES, Item
from fasttrain.kernels.prologue import Row
from fasttrain.kernels.resident import Resident
from fasttrain.kernels.triton_lanes import SUM_BLOCK

if TYPE_CHECKING:  # bound when the functions are wrapped
    import triton.language as tl

BLOCK = 32  # rows of one program
OPTIONS = {"num_warps": 1}


def why_not(items: Sequence[Item], rows: Sequence[Row], row_of: Sequence[int]) -> str | None:
    """As `fasttrain.kernels.driven.why_not`, of items where Triton runs."""
    return None


def driven(items: Sequence[Item], rows: Sequence[Row], row_of: Sequence[int]) -> Any:
    """As `fasttrain.kernels.driven.driven`."""
    return together(items, rows, row_of, parts(items, range(len(items))))


def parts(items: Sequence[Item], places: Iterable[int]) -> list[tuple[Sequence[int], Make]]:
    """The parts of a step of some of the items: those with as many sums are one."""
    by_sums: dict[int, list[int]] = {}
    for place in places:
        by_sums.setdefault(len(items[place].rule.sums or ()), []).append(place)
    return [(own, TritonDriven) for own in by_sums.values()]


class TritonDriven(Tabled):
    """A step of Triton's kernels. They are compiled when they are first launched: before a capture."""

    def __init__(self, items: Sequence[Item], rows: Sequence[Row], row_of: Sequence[int],
                 counted: frozenset[int] = frozenset()) -> None:
        device = items[0].tensors[0].device
        super().__init__(triton.place_of(device), items, rows, row_of, partial(chunk_of, device),
                         counted=counted)
        self.clips = [any(rows[row].clip_value is not None for row in group.rows) for group in self.groups]
        words = [self.numbers.view("live", index, torch.int64).view(len(group.rows), -1)
                 for index, group in enumerate(self.groups)]
        self.prologues = [(group.graph, own, self._made(at.rows, len(group.rows) * group.width, group.dtype),
                           self._made(at.skip, len(group.rows), torch.int32), not group.items[0].plain)
                          for group, own, at in zip(self.groups, words, self.made, strict=True)]
        self.tasks = [(group.kind, group.items, self.tables.view("fixed", index, torch.int64),
                       self._made(at.own_rows, (max(group.row_of) + 1) * at.own_width, group.dtype), at.own_width,
                       self.tables.view("live", index, torch.int64),
                       self._made(at.own_skip, max(group.row_of) + 1, torch.int32))
                      for index, (group, at) in enumerate(zip(self.groups, self.made, strict=True))]
        self.small = [("keyed_rows", self.numbers.view("live", len(self.groups), torch.int64), len(self.keyed)),
                      ("count_up", self.tables.view("fixed", len(self.groups), torch.int64), len(self.counts))]
        self.stages = Sums(self) if items[0].rule.sums else None
        if self.stages is not None:
            self.sums = self.stages.sums
        self.launches = ((self.stages is not None) + len(self.groups) + sum(len(chunks) > 0 for chunks in self.chunks) +
                         sum(count > 0 for *_, count in self.small))

    def _made(self, begin: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        return self.work[begin : begin + count * dtype.itemsize].view(dtype)

    def make(self) -> None:
        for own in self.prologues:
            prologue.run(*own)
        self._small(*self.small[0])

    def step(self) -> None:
        for index, (kind, items, table, rows, width, gradients, skip) in enumerate(self.tasks):
            if self.stages is not None:
                self.stages.begin(index, table, rows, width, gradients, skip)
            elif len(self.chunks[index]):
                triton.begin(kind, items, len(self.chunks[index]), table, rows, width, gradients, skip,
                             clip=self.clips[index])
        if self.stages is not None:
            self.stages.end()

    def count(self) -> None:
        self._small(*self.small[1])

    def _small(self, name: str, table: torch.Tensor, rows: int) -> None:
        if rows:
            interpreted = self.device.type == "cpu"
            block = 1 << max(rows - 1, 1).bit_length() if interpreted else BLOCK
            longest = max(group.width for group in self.groups)
            kernels(interpreted)[name][(-(-rows // block),)](table, rows, longest, block=block,
                                                             **({} if interpreted else OPTIONS))


def chunk_of(device: torch.device, items: Sequence[Item]) -> int:
    """Elements of a chunk."""
    if not items[0].rule.sums:
        return triton.block_of(device, items)
    storages = tuple(STORAGES[tensor.dtype] for tensor in items[0].tensors)
    return triton_sums.blocks_of(storages, device.type == "cpu") * SUM_BLOCK


class Sums:
    """The sums of a step whose rules all have as many: made in memory of their own, and taken where no item is skipped.

    Attributes:
        sums: float64 of shape (items, sums).
    """

    def __init__(self, step: TritonDriven) -> None:
        self.walks = [triton_stages.walk_of(group.kind, group.items, fixed)
                      for group, fixed in zip(step.groups, step.fixed, strict=True)]
        order = [place for group in step.groups for place in group.places]
        segments, self.begins = triton_stages.segments_of_walks(self.walks, order)
        self.rules = [group.rule for group in step.groups]
        count, width, self.device = len(order), len(self.rules[0].sums or ()), step.device
        flags = np.zeros(count, np.int64)  # where each item's skip flag lies, in words of the work memory
        for group, at in zip(step.groups, step.made, strict=True):
            flags[group.places] = at.own_skip // 4 + np.array(group.row_of)
        self.tables = Resident(step.place, [], [triton_sums.checked(segments), flags])
        self.flags = self.tables.view("fixed", 1, torch.int64)
        self.words = step.work[: step.end].view(torch.int32)
        self.partials = torch.empty(max(sum(len(walk.chunks) for walk in self.walks), 1), width, dtype=torch.float64,
                                    device=step.device)
        self.found, self.sums = torch.zeros(2, width, count, dtype=torch.float64, device=step.device)
        self.sums = self.sums.T
        self.skip = torch.empty(count, dtype=torch.int32, device=step.device)
        self.made = torch.empty(count, dtype=torch.bool, device=step.device)

    def begin(self, index: int, table: Tensor, rows: Tensor, width: int, gradients: Tensor, skip: Tensor) -> None:
        """Start one stage."""
        walk = self.walks[index]
        triton_stages.begin_stage(self.rules[index], walk.storages, walk.blocks, len(walk.chunks), table, rows, width,
                                  gradients, skip, self.partials[self.begins[index] :])

    def end(self) -> None:
        """Add up, and take the sums of the items that were stepped."""
        segments = self.tables.view("fixed", 0, torch.int64).view(-1, 2)
        triton_sums.add_up(self.partials, segments, self.device, self.found)
        torch.index_select(self.words, 0, self.flags, out=self.skip)
        torch.eq(self.skip, 0, out=self.made)
        torch.where(self.made, self.found, self.sums.T, out=self.sums.T)


# --- Kernels: those of csrc/cuda/driven.cuh ---------------------------------------------------------------------------

def mix(x):
    """`fasttrain.precision.draws.mix`."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


def keyed_rows(table, rows, longest, block: tl.constexpr):
    """Rows with keys: a copy of the row without (`longest` numbers at most), then two words of each operand's key."""
    number = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    number = tl.where(number < rows, number, rows - 1)  # several make the last one
    at = table + number * 9
    source = tl.load(at).to(tl.pointer_type(tl.uint32))
    flag = tl.load(at + 1).to(tl.pointer_type(tl.int32))
    target = tl.load(at + 2).to(tl.pointer_type(tl.uint32))
    tl.store(tl.load(at + 3).to(tl.pointer_type(tl.int32)), tl.load(flag))
    drawn = tl.load(tl.load(at + 4).to(tl.pointer_type(tl.int64)))
    width = tl.load(at + 5)
    for place in range(0, longest):
        tl.store(target + place, tl.load(source + place, mask=place < width, other=0), mask=place < width)
    target += width
    step = mix((tl.load(at + 6) + drawn).to(tl.uint64, bitcast=True))
    key = mix(step ^ tl.load(at + 7).to(tl.uint64, bitcast=True))
    mask = tl.load(at + 8)
    offset = key ^ key
    for operand in range(0, 16):
        own = mix(key + offset)
        offset += 0x9E3779B97F4A7C15
        random = ((mask >> operand) & 1) != 0
        tl.store(target, (own & 0xFFFFFFFF).to(tl.uint32), mask=random)
        tl.store(target + 1, (own >> 32).to(tl.uint32), mask=random)
        target += tl.where(random, 2, 0)


def count_up(table, rows, longest, block: tl.constexpr):
    """Counts go up by one where a step was made."""
    number = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = number < rows
    at = table + number * 3
    address = tl.load(at, mask=inside, other=0)
    flag = tl.load(at + 1, mask=inside, other=0).to(tl.pointer_type(tl.int32))
    made = inside & (tl.load(flag, mask=inside, other=1) == 0)
    kind = tl.load(at + 2, mask=inside, other=-1)
    single = address.to(tl.pointer_type(tl.float32))
    tl.store(single, tl.load(single, mask=made & (kind == 0), other=0.0) + 1.0, mask=made & (kind == 0))
    double = address.to(tl.pointer_type(tl.float64))
    tl.store(double, tl.load(double, mask=made & (kind == 1), other=0.0) + 1.0, mask=made & (kind == 1))
    short = address.to(tl.pointer_type(tl.int32))
    tl.store(short, tl.load(short, mask=made & (kind == 2), other=0) + 1, mask=made & (kind == 2))
    long = address.to(tl.pointer_type(tl.int64))
    tl.store(long, tl.load(long, mask=made & (kind == 3), other=0) + 1, mask=made & (kind == 3))


FUNCTIONS = (mix, keyed_rows, count_up)
OPERANDS = 16  # that `keyed_rows` can give keys to


@cache
def kernels(interpreted: bool) -> dict[str, Any]:
    """The functions by name, for the compiler or for the interpreter."""
    return triton.wrapped(FUNCTIONS, interpreted)


def compile_ahead(name: str, arch: int) -> Any:
    """Compile `keyed_rows` or `count_up` for a GPU that need not be here."""
    return triton.compile_for(kernels(False)[name], arch, OPTIONS, {"table": "*i64", "rows": "i32", "longest": "i32"},
                              {"block": BLOCK})
