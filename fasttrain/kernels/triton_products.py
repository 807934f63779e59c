"""One tile of a symmetric product, in Triton; `fasttrain.kernels.triton_symmetric` starts it.

Plain functions, wrapped like those of `fasttrain.kernels.triton_codecs`. What a program computes lies on or above the
diagonal; it writes that, and its mirror image. Offsets of tiles are 64 bits wide, those within a tile 32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # bound when the functions are wrapped
    import triton.language as tl

    from fasttrain.kernels.triton_codecs import bfloat16_bits


# --- Which tile -------------------------------------------------------------------------------------------------------

def corner(number):
    """Row and column of a number that counts the places on and above a diagonal column by column: 00 01 11 02 12 22."""
    column = ((tl.sqrt((8 * number + 1).to(tl.float32)) - 1) * 0.5).to(tl.int32)  # one off at most, and put right
    column += ((column + 1) * (column + 2) // 2 <= number).to(tl.int32)
    column -= (column * (column + 1) // 2 > number).to(tl.int32)
    return number - column * (column + 1) // 2, column


def place(number, tiles, group: tl.constexpr):
    """The same in groups of columns, row by row in a group: programs that run together read the same lines.

    Of a group of `width` columns that begins at column `first` there are `first` whole rows, and below them a corner.
    """
    _, column = corner(number)
    first = column // group * group
    width = tl.minimum(tiles - first, group)
    number -= first * (first + 1) // 2
    above = number < first * width
    row, column = corner(tl.where(above, 0, number - first * width))
    return tl.where(above, number // width, first + row), first + tl.where(above, number % width, column)


# --- Tiles of memory --------------------------------------------------------------------------------------------------

def piece(x, line, step, lines_left, steps_left, stride, tall: tl.constexpr, interpreted: tl.constexpr):
    """X[line, step], or X[step, line] for tall ones: one of the two indices stands upright, the other lies.

    X points to the first line and step that are wanted; so many are left from there. Rows begin `stride` apart.
    """
    offsets = step * stride + line if tall else line * stride + step
    values = tl.load(x + offsets, mask=(line < lines_left) & (step < steps_left), other=0.0)
    if interpreted:  # whose products of bfloat16 are those of the bits
        values = values.to(tl.float32)
    return values


def origin(begin, stride, tall: tl.constexpr):
    """Where line `begin` begins."""
    return begin if tall else begin.to(tl.int64) * stride


def square(x, row, column, side, tile: tl.constexpr):
    """Pointers to a tile of a square matrix, and which of them lie inside."""
    line = tl.arange(0, tile)
    pointers = x + (row.to(tl.int64) * side + column) + (line[:, None] * side + line[None, :])
    return pointers, ((row + line) < side)[:, None] & ((column + line) < side)[None, :]


def rounded(value, out, interpreted: tl.constexpr):
    """fp32 to the type that `out` points to, to nearest, ties to even."""
    if out.dtype.element_ty == tl.float32:
        result = value
    elif interpreted and out.dtype.element_ty == tl.bfloat16:
        result = bfloat16_bits(value).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(out.dtype.element_ty, fp_downcast_rounding="rtne")
    return result


# --- The kernel -------------------------------------------------------------------------------------------------------

def product(x, out, keep, scale, side, length, tiles, tall: tl.constexpr, polynomial: tl.constexpr, tile: tl.constexpr,
            depth: tl.constexpr, group: tl.constexpr, interpreted: tl.constexpr):
    """out = X X^T, or X^T X for tall ones, or of a symmetric X keep X + scale X X; for each of a batch of matrices.

    `tiles` of `tile` cover a side; `length` is the other side of X.
    """
    corners = tiles * (tiles + 1) // 2
    matrix = (tl.program_id(0) // corners).to(tl.int64)
    row, column = place(tl.program_id(0) % corners, tiles, group)
    x += matrix * side * length
    out += matrix * side * side
    row *= tile
    column *= tile
    line, step = tl.arange(0, tile), tl.arange(0, depth)
    stride = side if tall else length
    left, right = x + origin(row, stride, tall), x + origin(column, stride, tall)
    value = tl.full((tile, tile), 0.0, tl.float32)
    for start in tl.range(0, length, depth):
        a = piece(left, line[:, None], step[None, :], side - row, length - start, stride, tall, interpreted)
        b = piece(right, line[None, :], step[:, None], side - column, length - start, stride, tall, interpreted)
        value = tl.dot(a, b, value, input_precision="ieee")
        left += depth * stride if tall else depth
        right += depth * stride if tall else depth
    if polynomial:
        pointers, inside = square(x, row, column, side, tile)
        value = scale * value + keep * tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    result = rounded(value, out, interpreted)
    mirrored = tl.trans(result)
    pointers, inside = square(out, row, column, side, tile)
    if row == column:  # no order of sums is taken for granted: what is below the diagonal is what is above it
        tl.store(pointers, tl.where(line[:, None] <= line[None, :], result, mirrored), mask=inside)
    else:
        tl.store(pointers, result, mask=inside)
        pointers, inside = square(out, column, row, side, tile)
        tl.store(pointers, mirrored, mask=inside)


FUNCTIONS = (corner, place, piece, origin, square, rounded, product)
