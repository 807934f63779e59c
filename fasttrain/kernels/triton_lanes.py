"""Sums in the order of `fasttrain.kernels.norm`, in Triton: the same bits as on the CPU, whatever the grid.

A chunk is a power of two of blocks of 4,096 elements, so that its tree is a branch of its tensor's. It is walked by
tiles: element i of a block belongs to lane i % 16, so a thread that reads 16 bytes keeps as many lanes as it reads
elements, and adds rows of 16 elements in turn. The tree pairs neighbours; what is missing counts as zero.

Plain functions, wrapped like those of `fasttrain.kernels.triton_codecs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # bound when the functions are wrapped
    import triton.language as tl

    from fasttrain.kernels.triton_codecs import load

LANES, SUM_BLOCK = 16, 4096  # as in fasttrain.kernels.norm; the kernels spell them out


def tile_of(blocks: tl.constexpr):
    """The places of the first row of every block in a chunk, (blocks, 16)."""
    return tl.expand_dims(tl.arange(0, blocks), 1) * 4096 + tl.expand_dims(tl.arange(0, 16), 0)


def tree(x, size: tl.constexpr, levels: tl.constexpr):
    """The sum of 2^levels = size numbers, of shape (1,): neighbours in pairs, level by level."""
    x = tl.reshape(x, (size,))
    for level in tl.static_range(levels):
        even, odd = tl.split(tl.reshape(x, (size >> (level + 1), 2)))
        x = even + odd
    return x


def put_partial(partials, index, x, size: tl.constexpr, levels: tl.constexpr):
    """Store the sum of a chunk's lanes."""
    tl.store(partials + index + tl.arange(0, 1), tree(x, size, levels))


def add_squares(lanes, bad, x, wide: tl.constexpr, interpreted: tl.constexpr):
    """One row more: squares to the lanes, and to `bad` whether an element is infinite or NaN."""
    if wide:
        largest = tl.full((), 1.7976931348623157e308, tl.float64)
    else:
        largest = tl.full((), 3.4028234663852886e38, tl.float32)
    bad = bad | ~(tl.abs(x) <= largest)
    number = x.to(tl.float64)
    if wide or interpreted:
        lanes = lanes + number * number
    else:  # a square of 24 digits is exact in float64, so it is rounded once either way
        lanes = tl.fma(number, number, lanes)
    return lanes, bad


def square(table, addresses, partials, storage: tl.constexpr, blocks: tl.constexpr, size: tl.constexpr,
           levels: tl.constexpr, together: tl.constexpr, interpreted: tl.constexpr):
    """A kernel: of one chunk, the sum of squares, and in how many lanes an element is not finite."""
    program = tl.program_id(0).to(tl.int64)
    at = tl.load(addresses + program)
    count = tl.load(table + program * 4 + 1)
    wide: tl.constexpr = storage == 1
    first = tile_of(blocks)
    lanes = tl.full((blocks, 16), 0.0, tl.float64)
    bad = tl.full((blocks, 16), 0, tl.int1)
    if (at % 16 == 0) & (count == blocks * 4096):
        for row in range(0, 256, together):
            for more in tl.static_range(together):
                x = load(at, first + (row + more) * 16, first, storage, wide, True, interpreted)
                lanes, bad = add_squares(lanes, bad, x, wide, interpreted)
    else:
        zero = tl.full((), 0.0, tl.float64 if wide else tl.float32)
        for row in range(0, tl.minimum((count + 15) // 16, 256).to(tl.int32), together):
            for more in tl.static_range(together):
                places = first + (row + more) * 16
                x = load(at, places, places < count, storage, wide, False, interpreted)
                lanes, bad = add_squares(lanes, bad, tl.where(places < count, x, zero), wide, interpreted)
    put_partial(partials, program * 2, lanes, size, levels)
    put_partial(partials, program * 2 + 1, bad.to(tl.float64), size, levels)


def add_up(partials, segments, sums, width: tl.constexpr, size: tl.constexpr, levels: tl.constexpr):
    """A kernel: the tree over a segment of rows of partial sums, `width` of them in a row. At most size^2 rows.

    Arguments:
        segments: first row and number of rows of each.
        sums: written, (width, segments).
    """
    segment, which = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = tl.load(segments + segment * 2)
    count = tl.load(segments + segment * 2 + 1)
    places = tl.arange(0, size)
    branches = tl.full((size,), 0.0, tl.float64)
    for branch in range(0, ((count + (size - 1)) // size).to(tl.int32)):
        rows = places + branch * size
        x = tl.load(partials + (first + rows) * width + which, mask=rows < count, other=0.0)
        branches = tl.where(places == branch, tl.broadcast_to(tree(x, size, levels), (size,)), branches)
    at = sums + which * tl.num_programs(0) + segment + tl.arange(0, 1)
    tl.store(at, tree(branches, size, levels))


FUNCTIONS = (tile_of, tree, put_partial, add_squares)
KERNELS = (square, add_up)
