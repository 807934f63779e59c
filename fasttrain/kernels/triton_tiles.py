"""What Adafactor is made of, in Triton; `fasttrain.kernels.triton_factored` starts these kernels and lays the tables.

Plain functions, wrapped like those of `fasttrain.kernels.triton_codecs`. A matrix is cut into tiles of `rows` by
`steps` times `columns`; everything that is summed is float64, and every sum is made by one program in one order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # bound when the functions are wrapped
    import triton.language as tl

    from fasttrain.kernels.triton_codecs import divide, load, square_root, store, without_denormal


# --- Parts ------------------------------------------------------------------------------------------------------------

def total(x, axis: tl.constexpr, interpreted: tl.constexpr):
    """The sum over an axis."""
    if interpreted:  # there Triton's own compound functions are those of the compiler, which cannot be called
        result = tl.reduce(x, axis, tl.standard._sum_combine)
    else:
        result = tl.sum(x, axis=axis)
    return result


def at_least(x, least):
    """x, or `least` where it is smaller; NaN stays."""
    return tl.where(x < least, least, x)


def larger(x, other):
    """The larger one; `other` where x is NaN."""
    return tl.where(x > other, x, other)


def element(x, wide: tl.constexpr):
    """A float64 in the type that a rule is computed in."""
    return x if wide else x.to(tl.float32)


def row_factors(lines, means, chunk, numbers, row, rows_here, wide: tl.constexpr):
    """The factors of a tile's rows: moved row means over their own mean, which is at least eps1."""
    mean = tl.load(means + tl.load(chunk + 11)) / tl.load(chunk + 12).to(tl.float64)
    moved = tl.load(lines + tl.load(chunk + 9) + row, mask=row < rows_here, other=0.0)
    return element(moved / at_least(mean, tl.load(numbers + 4)), wide)


def update_of(g, second, numbers, wide: tl.constexpr):
    """The gradient over the root of the second moment, which is at least eps1^2."""
    eps = tl.load(numbers + 4)
    return divide(g * element(tl.load(numbers), wide), square_root(at_least(second, element(eps * eps, wide)), wide),
                  wide)


def rate_of(sums, parameters, parameter, numbers):
    """rho max(eps2, rms(p)) / max(1, rms(u) / d), in float64."""
    elements = tl.load(numbers + 7)
    size = larger(tl.sqrt(tl.load(sums + parameter) / elements), tl.load(numbers + 5)) * tl.load(numbers + 3)
    length = tl.sqrt(tl.load(sums + parameters + parameter) / elements) / tl.load(numbers + 6)
    return size / larger(length, tl.full((), 1.0, tl.float64))


def moved_variance(at, offsets, inside, g, numbers, storage: tl.constexpr, whole: tl.constexpr,
                   interpreted: tl.constexpr, wide: tl.constexpr):
    """The running mean of squares, of elements that keep it whole; without denormal numbers, in the element's type."""
    old = load(at, offsets, inside, storage, True, whole, interpreted)
    weight = tl.load(numbers + 2)
    scaled = g.to(tl.float64) * tl.load(numbers)
    moved = old * (1.0 - weight) + scaled * scaled * weight
    return without_denormal(element(moved, wide), wide)


# --- Kernels ----------------------------------------------------------------------------------------------------------

def square_tile(table, parts, storage: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, steps: tl.constexpr,
                interpreted: tl.constexpr):
    """Of one tile of the gradient, the sums of squares of its rows and of its columns."""
    chunk = table + tl.program_id(0).to(tl.int64) * 13
    at, stride = tl.load(chunk + 1), tl.load(chunk + 4)
    rows_here, columns_here = tl.load(chunk + 2), tl.load(chunk + 3)
    row, column = tl.arange(0, rows), tl.arange(0, columns)
    down, across = tl.expand_dims(row, 1), tl.expand_dims(column, 0)
    to = parts + tl.load(chunk + 8) + column
    sums = tl.full((rows, columns), 0.0, tl.float64)
    if tl.load(chunk + 6) == 1:
        places = down * tl.multiple_of(stride, 8) + across
        for step in range(0, steps):
            x = load(at, places + step * columns, down, storage, True, True, interpreted)
            squares = x * x
            sums = sums + squares
            tl.store(to + step * columns, total(squares, 0, interpreted))
    else:
        places = down * stride + across
        zero = tl.full((), 0.0, tl.float64)
        for step in range(0, ((columns_here + (columns - 1)) // columns).to(tl.int32)):
            inside = (down < rows_here) & (across + step * columns < columns_here)
            x = load(at, places + step * columns, inside, storage, True, False, interpreted)
            squares = tl.where(inside, x * x, zero)
            sums = sums + squares
            tl.store(to + step * columns, total(squares, 0, interpreted), mask=column + step * columns < columns_here)
    tl.store(parts + tl.load(chunk + 7) + row, total(sums, 1, interpreted), mask=row < rows_here)


def move_lines(table, numbers, parts, lines, partials, storage: tl.constexpr, wide: tl.constexpr,
               together: tl.constexpr, count: tl.constexpr, interpreted: tl.constexpr):
    """New means of some rows or columns: stored as states, in float64 for the passes to come, and their sum."""
    program = tl.program_id(0).to(tl.int64)
    chunk = table + program * 8
    first, distance, pieces, here = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2), tl.load(chunk + 3)
    row = numbers + tl.load(chunk + 5) * 8
    line, piece = tl.arange(0, count), tl.arange(0, together)
    across, down = tl.expand_dims(line, 0), tl.expand_dims(piece, 1)
    sums = tl.full((together, count), 0.0, tl.float64)
    for begin in range(0, pieces.to(tl.int32), together):
        inside = (down + begin < pieces) & (across < here)
        sums = sums + tl.load(parts + first + (down + begin) * distance + across, mask=inside, other=0.0)
    scale, weight = tl.load(row), tl.load(row + 2)
    mean = total(sums, 0, interpreted) * (scale * scale) / tl.load(chunk + 6).to(tl.float64)
    at = tl.load(chunk + 4)
    moved = load(at, line, line < here, storage, True, False, interpreted) * (1.0 - weight) + mean * weight
    kept = without_denormal(element(moved, wide), wide)
    zero = tl.full((), 0.0, tl.float64)
    moved = tl.where((kept == 0.0) | (line >= here), zero, moved)
    store(at, line, line < here, moved, storage, False, interpreted)
    tl.store(lines + tl.load(chunk + 7) + line, moved, mask=line < here)
    tl.store(partials + program, total(moved, 0, interpreted))


def measure_tile(table, numbers, lines, means, partials, p_storage: tl.constexpr, g_storage: tl.constexpr,
                 wide: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, steps: tl.constexpr,
                 interpreted: tl.constexpr):
    """Of one tile, the sums of squares of the parameter and of the update."""
    program = tl.program_id(0).to(tl.int64)
    chunk = table + program * 13
    at_p, at_g, stride = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 4)
    rows_here, columns_here = tl.load(chunk + 2), tl.load(chunk + 3)
    row, column = tl.arange(0, rows), tl.arange(0, columns)
    down, across = tl.expand_dims(row, 1), tl.expand_dims(column, 0)
    numbers = numbers + tl.load(chunk + 5) * 8
    by_row = tl.expand_dims(row_factors(lines, means, chunk, numbers, row, rows_here, wide), 1)
    by_column = lines + tl.load(chunk + 10) + column
    zero = tl.full((), 0.0, tl.float64)
    p_squares = tl.full((rows, columns), 0.0, tl.float64)
    u_squares = tl.full((rows, columns), 0.0, tl.float64)
    if tl.load(chunk + 6) == 1:
        places = down * tl.multiple_of(stride, 8) + across
        for step in range(0, steps):
            p = load(at_p, places + step * columns, down, p_storage, True, True, interpreted)
            g = load(at_g, places + step * columns, down, g_storage, wide, True, interpreted)
            factors = tl.expand_dims(element(tl.load(by_column + step * columns), wide), 0)
            u = update_of(g, by_row * factors, numbers, wide).to(tl.float64)
            p_squares = p_squares + p * p
            u_squares = u_squares + u * u
    else:
        places = down * stride + across
        for step in range(0, ((columns_here + (columns - 1)) // columns).to(tl.int32)):
            inside = (down < rows_here) & (across + step * columns < columns_here)
            p = load(at_p, places + step * columns, inside, p_storage, True, False, interpreted)
            g = load(at_g, places + step * columns, inside, g_storage, wide, False, interpreted)
            factors = tl.load(by_column + step * columns, mask=column + step * columns < columns_here, other=0.0)
            u = update_of(g, by_row * tl.expand_dims(element(factors, wide), 0), numbers, wide).to(tl.float64)
            p_squares = p_squares + tl.where(inside, p * p, zero)
            u_squares = u_squares + tl.where(inside, u * u, zero)
    tl.store(partials + program * 2, total(total(p_squares, 1, interpreted), 0, interpreted))
    tl.store(partials + program * 2 + 1, total(total(u_squares, 1, interpreted), 0, interpreted))


def apply_tile(table, numbers, lines, means, sums, parameters, p_storage: tl.constexpr, g_storage: tl.constexpr,
               wide: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, steps: tl.constexpr,
               interpreted: tl.constexpr):
    """p = keep p - rate u, of one tile."""
    chunk = table + tl.program_id(0).to(tl.int64) * 13
    at_p, at_g, stride = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 4)
    rows_here, columns_here, parameter = tl.load(chunk + 2), tl.load(chunk + 3), tl.load(chunk + 5)
    row, column = tl.arange(0, rows), tl.arange(0, columns)
    down, across = tl.expand_dims(row, 1), tl.expand_dims(column, 0)
    numbers = numbers + parameter * 8
    rate = element(rate_of(sums, parameters, parameter, numbers), wide)
    keep = element(tl.load(numbers + 1), wide)
    by_row = tl.expand_dims(row_factors(lines, means, chunk, numbers, row, rows_here, wide), 1)
    by_column = lines + tl.load(chunk + 10) + column
    if tl.load(chunk + 6) == 1:
        places = down * tl.multiple_of(stride, 8) + across
        for step in range(0, steps):
            p = load(at_p, places + step * columns, down, p_storage, wide, True, interpreted)
            g = load(at_g, places + step * columns, down, g_storage, wide, True, interpreted)
            factors = tl.expand_dims(element(tl.load(by_column + step * columns), wide), 0)
            new = p * keep - rate * update_of(g, by_row * factors, numbers, wide)
            store(at_p, places + step * columns, down, new, p_storage, True, interpreted)
    else:
        places = down * stride + across
        for step in range(0, ((columns_here + (columns - 1)) // columns).to(tl.int32)):
            inside = (down < rows_here) & (across + step * columns < columns_here)
            p = load(at_p, places + step * columns, inside, p_storage, wide, False, interpreted)
            g = load(at_g, places + step * columns, inside, g_storage, wide, False, interpreted)
            factors = tl.load(by_column + step * columns, mask=column + step * columns < columns_here, other=0.0)
            new = p * keep - rate * update_of(g, by_row * tl.expand_dims(element(factors, wide), 0), numbers, wide)
            store(at_p, places + step * columns, inside, new, p_storage, False, interpreted)


def measure_whole(table, numbers, partials, p_storage: tl.constexpr, g_storage: tl.constexpr, v_storage: tl.constexpr,
                  wide: tl.constexpr, block: tl.constexpr, interpreted: tl.constexpr):
    """Of one chunk of a parameter whose second moment is whole, the sums of squares of parameter and update."""
    program = tl.program_id(0).to(tl.int64)
    chunk = table + program * 6
    at_p, at_g, at_v, here = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2), tl.load(chunk + 3)
    numbers = numbers + tl.load(chunk + 4) * 8
    offsets = tl.arange(0, block)
    inside = offsets < here
    zero = tl.full((), 0.0, tl.float64)
    if (tl.load(chunk + 5) == 1) & (here == block):
        p = load(at_p, offsets, inside, p_storage, True, True, interpreted)
        g = load(at_g, offsets, inside, g_storage, wide, True, interpreted)
        v = moved_variance(at_v, offsets, inside, g, numbers, v_storage, True, interpreted, wide)
    else:
        p = load(at_p, offsets, inside, p_storage, True, False, interpreted)
        g = load(at_g, offsets, inside, g_storage, wide, False, interpreted)
        v = moved_variance(at_v, offsets, inside, g, numbers, v_storage, False, interpreted, wide)
    u = update_of(g, v, numbers, wide).to(tl.float64)
    tl.store(partials + program * 2, total(tl.where(inside, p * p, zero), 0, interpreted))
    tl.store(partials + program * 2 + 1, total(tl.where(inside, u * u, zero), 0, interpreted))


def apply_whole(table, numbers, sums, parameters, p_storage: tl.constexpr, g_storage: tl.constexpr,
                v_storage: tl.constexpr, wide: tl.constexpr, block: tl.constexpr, interpreted: tl.constexpr):
    """Store its second moment, and p = keep p - rate u."""
    chunk = table + tl.program_id(0).to(tl.int64) * 6
    at_p, at_g, at_v, here = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2), tl.load(chunk + 3)
    parameter = tl.load(chunk + 4)
    numbers = numbers + parameter * 8
    rate = element(rate_of(sums, parameters, parameter, numbers), wide)
    keep = element(tl.load(numbers + 1), wide)
    offsets = tl.arange(0, block)
    inside = offsets < here
    if (tl.load(chunk + 5) == 1) & (here == block):
        p = load(at_p, offsets, inside, p_storage, wide, True, interpreted)
        g = load(at_g, offsets, inside, g_storage, wide, True, interpreted)
        v = moved_variance(at_v, offsets, inside, g, numbers, v_storage, True, interpreted, wide)
        store(at_v, offsets, inside, v, v_storage, True, interpreted)
        store(at_p, offsets, inside, p * keep - rate * update_of(g, v, numbers, wide), p_storage, True, interpreted)
    else:
        p = load(at_p, offsets, inside, p_storage, wide, False, interpreted)
        g = load(at_g, offsets, inside, g_storage, wide, False, interpreted)
        v = moved_variance(at_v, offsets, inside, g, numbers, v_storage, False, interpreted, wide)
        store(at_v, offsets, inside, v, v_storage, False, interpreted)
        store(at_p, offsets, inside, p * keep - rate * update_of(g, v, numbers, wide), p_storage, False, interpreted)


FUNCTIONS = (total, at_least, larger, element, row_factors, update_of, rate_of, moved_variance)
KERNELS = (square_tile, move_lines, measure_tile, apply_tile, measure_whole, apply_whole)
