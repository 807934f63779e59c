"""Steps that a device drives, in Triton (`fasttrain.kernels.driven`), or in its interpreter.

One launch makes the rows of each computation of coefficients; one more those of items that draw, if there are any; then
there is one for each (rule, storages), and one that counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from fasttrain.kernels import prologue, triton
from fasttrain.kernels.driven_tables import Tabled
from fasttrain.kernels.item import Item
from fasttrain.kernels.prologue import Row

if TYPE_CHECKING:  # bound when the functions are wrapped
    import triton.language as tl

BLOCK = 32  # rows of one program
OPTIONS = {"num_warps": 1}


def why_not(items: Sequence[Item], rows: Sequence[Row], row_of: Sequence[int]) -> str | None:
    """As `fasttrain.kernels.driven.why_not`, of items where Triton runs."""
    staged = [item for item in items if item.rule.sums is not None]
    return (f"{staged[0].name} is stepped by {staged[0].rule.name}, a stage with sums, which no GPU drives yet"
            if staged else None)


def driven(items: Sequence[Item], rows: Sequence[Row], row_of: Sequence[int]) -> TritonDriven:
    """As `fasttrain.kernels.driven.driven`."""
    return TritonDriven(items, rows, row_of)


class TritonDriven(Tabled):
    """A step of Triton's kernels. They are compiled when they are first launched: before a capture."""

    def __init__(self, items: Sequence[Item], rows: Sequence[Row], row_of: Sequence[int]) -> None:
        device = items[0].tensors[0].device
        super().__init__(triton.place_of(device), items, rows, row_of, partial(triton.block_of, device))
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
        self.launches = (len(self.groups) + sum(len(chunks) > 0 for chunks in self.chunks) +
                         sum(count > 0 for *_, count in self.small))

    def _made(self, begin: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        return self.work[begin : begin + count * dtype.itemsize].view(dtype)

    def queue(self) -> None:
        for own in self.prologues:
            prologue.run(*own)
        keyed, count = self.small
        self._small(*keyed)
        for index, (kind, items, table, rows, width, gradients, skip) in enumerate(self.tasks):
            if len(self.chunks[index]):
                triton.begin(kind, items, len(self.chunks[index]), table, rows, width, gradients, skip,
                             clip=self.clips[index])
        self._small(*count)

    def _small(self, name: str, table: torch.Tensor, rows: int) -> None:
        if rows:
            interpreted = self.device.type == "cpu"
            block = 1 << max(rows - 1, 1).bit_length() if interpreted else BLOCK
            longest = max(group.width for group in self.groups)
            kernels(interpreted)[name][(-(-rows // block),)](table, rows, longest, block=block,
                                                             **({} if interpreted else OPTIONS))


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
