"""Buckets in Triton: moves between storages, and sums of chunks; `fasttrain.kernels.pack` and `chunks` define the bits.

The kernels are plain functions, wrapped like those of `fasttrain.kernels.triton_codecs`. What a launch is told lies in
a table of 64-bit words: the compiler specialises on nothing else than dtypes, and many tensors are one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels import resident, triton_bits, triton_blocks, triton_codecs, triton_kept
from fasttrain.kernels.item import STORAGES
from fasttrain.kernels.pack import scale_bits
from fasttrain.kernels.triton import compile_for, guard, patched, wrapped
from fasttrain.precision.codecs import NUMBER

if TYPE_CHECKING:  # bound when the functions are wrapped
    import triton.language as tl

    from fasttrain.kernels.triton_kept import fetch, put, rounded

BUCKET = "the table of a bucket"
kept: resident.Tables[resident.Resident] = resident.Tables(4096)  # of slots that are packed one by one, too
INT8 = NUMBER["int8"]
BLOCK, BLOCK_INTERPRETED = 1024, 1 << 16  # elements of a program: whole blocks of codes
OPTIONS = {"num_warps": 4, "maxnreg": 96, "enable_fp_fusion": False}  # without a limit Triton 3.7's ptxas spills
COLUMNS = 7  # of the table of moves: source, target, its units, residual, elements, bits of the scale, aligned or not
# The table of a sum: out, elements, bits of the scale, aligned or not, ranks; then the chunks, then their units.


# --- Kernels ----------------------------------------------------------------------------------------------------------

def move_chunk(table, source: tl.constexpr, target: tl.constexpr, lost: tl.constexpr, wide: tl.constexpr,
               block: tl.constexpr, interpreted: tl.constexpr):
    """Move one chunk, one row of the table; `source`, `target` and `lost` are codecs, `lost` -1 if there is none."""
    row = table + tl.program_id(0).to(tl.int64) * 7
    count = tl.load(row + 4)
    if (tl.load(row + 6) == 1) & (count == block):
        move_elements(row, count, source, target, lost, wide, block, True, interpreted)
    else:
        move_elements(row, count, source, target, lost, wide, block, False, interpreted)


def move_elements(row, count, source: tl.constexpr, target: tl.constexpr, lost: tl.constexpr, wide: tl.constexpr,
                  block: tl.constexpr, whole: tl.constexpr, interpreted: tl.constexpr):
    """The same of `count` elements; `whole`: all of a block, at addresses that are aligned."""
    offsets = tl.arange(0, block)
    inside = offsets < count
    value = fetch(tl.load(row), 0, offsets, inside, count, source, wide, block, whole, interpreted)
    value = value * scale_of(row + 5, wide)
    to, units, beside = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    if lost >= 0:
        value = value + fetch(beside, 0, offsets, inside, count, lost, wide, block, whole, interpreted)
    put(to, units, offsets, inside, count, value, 0, target, block, whole, interpreted)
    if lost >= 0:
        if target == 10:
            tl.debug_barrier()  # other threads of this program wrote what is read here
            sent = fetch(to, units, offsets, inside, count, target, wide, block, whole, interpreted)
        else:
            sent = stored(value, target, wide, interpreted)
        zero = tl.full((), 0.0, value.dtype)
        put(beside, 0, offsets, inside, count, tl.where(is_finite(sent), value - sent, zero), 0, lost, block, whole,
            interpreted)


def sum_chunk(table, sums, flags, source: tl.constexpr, target: tl.constexpr, ranks: tl.constexpr, wide: tl.constexpr,
              squares: tl.constexpr, block: tl.constexpr, interpreted: tl.constexpr):
    """Add one block of the chunks of all ranks."""
    count = tl.load(table + 1) - tl.program_id(0).to(tl.int64) * block
    if (tl.load(table + 3) == 1) & (count >= block):
        sum_elements(table, sums, flags, count, source, target, ranks, wide, squares, block, True, interpreted)
    else:
        sum_elements(table, sums, flags, count, source, target, ranks, wide, squares, block, False, interpreted)


def sum_elements(table, sums, flags, count, source: tl.constexpr, target: tl.constexpr, ranks: tl.constexpr,
                 wide: tl.constexpr, squares: tl.constexpr, block: tl.constexpr, whole: tl.constexpr,
                 interpreted: tl.constexpr):
    """The same of `count` elements; `whole`: all of a block, at addresses that are aligned."""
    begin = tl.program_id(0).to(tl.int64) * block
    offsets = tl.arange(0, block)
    inside = offsets < count
    total = chunk_of(table, 0, begin, offsets, inside, count, source, ranks, wide, block, whole, interpreted)
    for rank in tl.static_range(1, ranks):
        total = total + chunk_of(table, rank, begin, offsets, inside, count, source, ranks, wide, block, whole,
                                 interpreted)
    total = total * scale_of(table + 2, wide)
    to = tl.load(table) + begin * bytes_of(target)
    put(to, 0, offsets, inside, count, total, 0, target, block, whole, interpreted)
    if squares:
        sent = stored(total, target, wide, interpreted)
        exact = tl.where(inside, sent.to(tl.float64), tl.full((), 0.0, tl.float64))
        bad = inside & (is_finite(sent) == 0)
        tl.store(sums + tl.program_id(0), tl.reduce(exact * exact, 0, tl.standard._sum_combine))
        tl.store(flags + tl.program_id(0), tl.reduce(bad.to(tl.int32), 0, tl.standard._elementwise_max))


def chunk_of(table, rank: tl.constexpr, begin, offsets, inside, count, source: tl.constexpr, ranks: tl.constexpr,
             wide: tl.constexpr, block: tl.constexpr, whole: tl.constexpr, interpreted: tl.constexpr):
    """The values of one rank's chunk from element `begin` on."""
    at = tl.load(table + 5 + rank) + begin * bytes_of(source)
    units = tl.load(table + 5 + ranks + rank) + begin // 256 * 4 if source == 10 else 0
    return fetch(at, units, offsets, inside, count, source, wide, block, whole, interpreted)


def bytes_of(codec: tl.constexpr):
    """Of one element."""
    return 8 if codec == 1 else 4 if codec == 0 else 1 if codec == 10 else 2


def scale_of(at, wide: tl.constexpr):
    """The scale whose bits, as of a float64, lie at an address."""
    scale = tl.load(at).to(tl.float64, bitcast=True)
    return scale if wide else scale.to(tl.float32)


def stored(value, storage: tl.constexpr, wide: tl.constexpr, interpreted: tl.constexpr):
    """What a plain storage keeps of values."""
    if storage == 1:
        kept = value
    elif storage == 0:
        kept = value.to(tl.float32)
    else:
        kept = rounded(value.to(tl.float32), storage, interpreted)
    return kept.to(tl.float64) if wide else kept


def is_finite(value):
    """Neither infinite nor NaN: a comparison with NaN is false."""
    return tl.abs(value) < float("inf")


FUNCTIONS = (bytes_of, scale_of, stored, is_finite, chunk_of, move_elements, move_chunk, sum_elements, sum_chunk)


# --- Launches ---------------------------------------------------------------------------------------------------------

@cache
def kernels(interpreted: bool) -> dict[str, Any]:
    """The functions by name, for the compiler or for the interpreter."""
    return wrapped([*triton_codecs.FUNCTIONS, *triton_bits.FUNCTIONS, *triton_kept.FUNCTIONS, *triton_blocks.FUNCTIONS,
                    *FUNCTIONS], interpreted)


def move(moves: Sequence[tuple[Tensor, Tensor, Tensor | None]], scale: float) -> None:
    """Move flat tensors, (source, target, residual or None): one launch for each combination of dtypes."""
    groups: dict[tuple[int, int, int], list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]] = {}
    for source, target, lost in moves:
        kind = (STORAGES[source.dtype], STORAGES[target.dtype], -1 if lost is None else STORAGES[lost.dtype])
        groups.setdefault(kind, []).append((source, target, None, lost))
    for kind, group in groups.items():
        _launch_moves(kind, group, scale)


def encode(bucket: Tensor, codes: Tensor, units: Tensor, scale: float, residual: Tensor | None) -> None:
    """Write flat numbers as codes and units."""
    kind = (STORAGES[bucket.dtype], INT8, -1 if residual is None else STORAGES[residual.dtype])
    _launch_moves(kind, [(bucket, codes, units, residual)], scale)


def _launch_moves(kind: tuple[int, int, int], group: Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor | None]],
                  scale: float) -> None:
    device, wide = group[0][0].device, 1 in kind[:2]
    block = BLOCK_INTERPRETED if device.type == "cpu" else BLOCK
    elements = np.array([len(source) for source, *_ in group], np.int64)
    chunks = -(-elements // block)
    of = np.repeat(np.arange(len(group)), chunks)
    begin = (np.arange(len(of)) - (np.cumsum(chunks) - chunks)[of]) * block
    table = np.empty((len(of), COLUMNS), np.int64)
    for column in range(4):
        arrays = [row[column] for row in group]
        bytes_each = 0 if arrays[0] is None else arrays[0].element_size()
        at = np.array([0 if array is None else array.data_ptr() for array in arrays], np.int64)
        table[:, column] = at[of] + begin // (256 if column == 2 else 1) * bytes_each
    table[:, 4] = np.minimum(elements[of] - begin, block)
    table[:, 5] = scale_bits(scale, wide)
    table[:, 6] = (table[:, [0, 1, 3]] % 16 == 0).all(axis=1)
    own = tuple(target.data_ptr() for _, target, *_ in group)  # of slots; what is packed into them lies anywhere
    if len(table):
        _start("move_chunk", device, len(table), patched(kept, (kind, own), table, device, BUCKET), source=kind[0],
               target=kind[1], lost=kind[2], wide=wide, block=block)


def sum_chunks(chunks: Sequence[Tensor], units: Sequence[Tensor] | None, out: Tensor, scale: float,
               squares: bool) -> tuple[Tensor, Tensor] | None:
    """Add chunks in order; with `squares`, (sum of squares, whether any element is infinite or NaN) of the result."""
    device, wide = out.device, torch.float64 in (chunks[0].dtype, out.dtype)
    block = BLOCK_INTERPRETED if device.type == "cpu" else BLOCK
    programs = -(-len(out) // block)
    places = [out.data_ptr(), *(chunk.data_ptr() for chunk in chunks)]
    aligned = all(place % 16 == 0 for place in places)
    table = [places[0], len(out), scale_bits(scale, wide), int(aligned), len(chunks), *places[1:],
             *(unit.data_ptr() for unit in units or ())]
    with resident.making("the workspace of a sum", device):
        sums = torch.zeros(programs if squares else 0, dtype=torch.float64, device=device)
        flags = torch.zeros(programs if squares else 0, dtype=torch.int32, device=device)
    if programs:
        there = patched(kept, ("sum", out.data_ptr()), np.array(table, np.int64), device, BUCKET)
        _start("sum_chunk", device, programs, there, sums, flags,
               source=STORAGES[chunks[0].dtype] if units is None else INT8, target=STORAGES[out.dtype],
               ranks=len(chunks), wide=wide, squares=squares, block=block)
    return (sums.sum(), flags.any()) if squares else None


def _start(name: str, device: torch.device, programs: int, *arrays: Tensor, **constants: Any) -> None:
    interpreted = device.type == "cpu"
    options = {} if interpreted else OPTIONS
    with guard(device):
        kernels(interpreted)[name][(programs,)](*arrays, **constants, interpreted=interpreted, **options)


def compile_ahead(name: str, arch: int, **constants: Any) -> Any:
    """Compile `move_chunk` or `sum_chunk` for a GPU that need not be here, as `fasttrain.kernels.triton.compile_ahead`.
    """
    function = kernels(interpreted=False)[name]
    types = {"table": "*i64", "sums": "*fp64", "flags": "*i32"}
    values = {**constants, "block": BLOCK, "interpreted": False}
    return compile_for(function, arch, OPTIONS, {name: types[name] for name in function.arg_names if name in types},
                       values)
