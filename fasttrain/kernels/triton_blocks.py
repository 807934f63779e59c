"""Codes that share a unit, in Triton: int8 (10), e4m3 (11), e5m2 (12), int4 (13); `fasttrain.precision.codecs` defines
the bits. A chunk holds whole blocks, and a block lies in one warp.

Plain functions, wrapped like those of `fasttrain.kernels.triton_codecs`. Integers wherever bits are meant. What lies
outside of the chunk counts as zero and is not written, except that a byte of two codes is written whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # bound when the functions are wrapped
    import triton.language as tl

    from fasttrain.kernels.triton_codecs import divide

    fraction: Any  # of fasttrain.kernels.triton_kept, which is bound to this file's functions in turn
    load_bits: Any
    store_bits: Any


def fetch_blocks(main, extra, offsets, inside, count, codec: tl.constexpr, block: tl.constexpr, whole: tl.constexpr):
    """The values of an operand."""
    size: tl.constexpr = 128 if codec & 15 == 13 else 256
    if codec & 15 == 13:
        half = tl.arange(0, block // 2)
        pair = load_bits(main, half, half * 2 < count, 8, whole)
        codes = tl.reshape(tl.join(pair & 15, pair >> 4), (block,)).to(tl.uint32)
    else:
        codes = load_bits(main, offsets, inside, 8, whole).to(tl.uint32)
    units = load_units(extra, count, size, block, whole)
    return decoded(codes, codec) * spread(units, size, block)


def load_units(address, count, size: tl.constexpr, block: tl.constexpr, whole: tl.constexpr):
    """One for each block of the chunk; zeros outside."""
    places = tl.arange(0, block // size)
    pointer = address.to(tl.pointer_type(tl.float32)) + places
    if whole:
        units = tl.load(pointer)
    else:
        units = tl.load(pointer, mask=places * size < count, other=0.0)
    return units


def spread(units, size: tl.constexpr, block: tl.constexpr):
    """To every element of its block."""
    return tl.reshape(tl.broadcast_to(tl.expand_dims(units, 1), (block // size, size)), (block,))


def decoded(codes, codec: tl.constexpr):
    """What codes (unsigned, 32 bits) stand for where the unit is one."""
    zero = tl.full((), 0.0, tl.float32)
    if codec & 15 == 11:
        bits = ((codes & 127) << 20) | ((codes & 128) << 24)
        value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    elif codec & 15 == 12:
        bits = ((codes & 127) << 21) | ((codes & 128) << 24)
        value = bits.to(tl.float32, bitcast=True) * 5.192296858534828e33  # 2^112
    elif codec & 16:
        top: tl.constexpr = 15 if codec & 15 == 13 else 255
        shift: tl.constexpr = 23 if codec & 15 == 13 else 20
        bits = (codes << shift) + (0x3F800000 - (top << shift))
        value = tl.where(codes == 0, zero, bits.to(tl.float32, bitcast=True))
    else:
        half: tl.constexpr = 8 if codec & 15 == 13 else 128
        number = (codes ^ half).to(tl.int32, bitcast=True) - half
        value = (number * tl.abs(number)).to(tl.float32)
    return value


def put_blocks(main, extra, offsets, inside, count, value, draws, codec: tl.constexpr, block: tl.constexpr,
               whole: tl.constexpr, interpreted: tl.constexpr):
    """Write codes and units."""
    size: tl.constexpr = 128 if codec & 15 == 13 else 256
    blocks: tl.constexpr = block // size
    bits = value.to(tl.uint32, bitcast=True)
    held = bits & 0x7FFFFFFF
    if not whole:
        held = tl.where(inside, held, tl.full((), 0, tl.uint32))
    largest = row_maxima(tl.reshape(held.to(tl.int32, bitcast=True), (blocks, size)), interpreted)  # a NaN is above all
    broken = largest >= 0x7F800000
    unit = unit_of(largest.to(tl.float32, bitcast=True), codec)
    nan = tl.full((), 0x7FC00000, tl.uint32).to(tl.float32, bitcast=True)
    places = tl.arange(0, blocks)
    pointer = extra.to(tl.pointer_type(tl.float32)) + places
    if whole:
        tl.store(pointer, tl.where(broken, nan, unit))
    else:
        tl.store(pointer, tl.where(broken, nan, unit), mask=places * size < count)

    one, zero = tl.full((), 1.0, tl.float32), tl.full((), 0.0, tl.float32)
    usable = (largest > 0) & (largest < 0x7F800000)
    inverse = spread(tl.where(usable, divide(one, unit, False), zero), size, block)
    usable = inverse > zero
    magnitude = tl.where(usable, tl.abs(value) * inverse, zero)
    codes = tl.where(usable, codes_of(magnitude, bits, draws, codec), tl.full((), 0, tl.int32))
    if codec & 15 == 13:
        codes = codes & 15
        if not whole:
            codes = tl.where(inside, codes, tl.full((), 0, tl.int32))
        low, high = tl.split(tl.reshape(codes, (block // 2, 2)))
        half = tl.arange(0, block // 2)
        store_bits(main, half, half * 2 < count, low | (high << 4), 8, whole)
    else:
        store_bits(main, offsets, inside, codes, 8, whole)


def row_maxima(integers, interpreted: tl.constexpr):
    """Of each row."""
    if interpreted:  # there Triton's own compound functions are those of the compiler, which cannot be called
        largest = tl.reduce(integers, 1, tl.standard._elementwise_max)
    else:
        largest = tl.max(integers, axis=1)
    return largest


def unit_of(largest, codec: tl.constexpr):
    """The unit of a block by its largest magnitude."""
    if codec & 15 == 11:
        unit = divide(largest, tl.full((), 448.0, tl.float32), False)
    elif codec & 15 == 12:
        unit = divide(largest, tl.full((), 57344.0, tl.float32), False)
    elif codec & 16:
        unit = largest
    elif codec & 15 == 13:
        unit = divide(largest, tl.full((), 49.0, tl.float32), False)
    else:
        unit = divide(largest, tl.full((), 16129.0, tl.float32), False)
    smallest = tl.full((), 1.1754943508222875e-38, tl.float32)
    return tl.where((largest > 0) & (unit < smallest), smallest, unit)


def codes_of(magnitude, bits, draws, codec: tl.constexpr):
    """The codes (int32) of finite magnitudes in units; `bits` are those of the values, which say sign and zero."""
    if codec & 15 == 11 or codec & 15 == 12:
        codes = float_codes(magnitude, draws, codec)
        if codec & 16:
            codes = tl.where(((bits & 0x7FFFFFFF) != 0) & (codes == 0), tl.full((), 1, tl.int32), codes)
        else:
            codes = codes | ((bits >> 31) << 7).to(tl.int32, bitcast=True)
    elif codec & 16:
        codes = tl.where((bits & 0x7FFFFFFF) == 0, tl.full((), 0, tl.int32), octaves(magnitude, draws, codec))
    else:
        codes = squares(magnitude, draws, codec)
        codes = tl.where((bits >> 31) != 0, -codes, codes)
    return codes


def squares(magnitude, draws, codec: tl.constexpr):
    """Codes whose squares stand for magnitudes: a root that may be off by one is set right by exact products."""
    top: tl.constexpr = 7.0 if codec & 15 == 13 else 127.0
    zero, one = tl.full((), 0.0, tl.float32), tl.full((), 1.0, tl.float32)
    if codec & 32:
        code = tl.minimum(tl.floor(tl.sqrt(magnitude)), top)
        code = code - tl.where(code * code > magnitude, one, zero)
        code = code + tl.where((code + 1.0) * (code + 1.0) <= magnitude, one, zero)
        code = tl.minimum(code, top)
        part = magnitude - code * code
        code = code + tl.where(fraction(draws) * (2.0 * code + 1.0) < part * 16777216.0, one, zero)
    else:
        code = tl.minimum(tl.floor(tl.sqrt(magnitude) + 0.5), top)
        code = code - tl.where((code > 0.0) & (code * (code - 1.0) + 0.25 > magnitude), one, zero)
        code = code + tl.where(code * (code + 1.0) + 0.25 <= magnitude, one, zero)
    return tl.minimum(code, top).to(tl.int32)


def octaves(magnitude, draws, codec: tl.constexpr):
    """Codes from 1: floating-point bits, counted down from one and cut."""
    top: tl.constexpr = 15 if codec & 15 == 13 else 255
    shift: tl.constexpr = 23 if codec & 15 == 13 else 20
    above = magnitude.to(tl.int32, bitcast=True)
    above = tl.minimum(above, 0x3F800000) - (0x3F800000 - (top << shift))
    if codec & 32:
        above = above + (draws & ((1 << shift) - 1)).to(tl.int32, bitcast=True)
    else:
        above = above + (1 << (shift - 1))
    return tl.minimum(tl.maximum(above >> shift, 1), top)


def float_codes(magnitude, draws, codec: tl.constexpr):
    """Codes of 8-bit floats without a sign."""
    e4m3: tl.constexpr = codec & 15 == 11
    shift: tl.constexpr = 20 if e4m3 else 21
    smallest: tl.constexpr = 0x3C800000 if e4m3 else 0x38800000  # 2^-6, 2^-14: the bits of the smallest normal number
    steps_of_one: tl.constexpr = 512.0 if e4m3 else 65536.0
    bits = magnitude.to(tl.int32, bitcast=True)
    below = bits < smallest
    steps = tl.where(below, magnitude * steps_of_one, tl.full((), 0.0, tl.float32))
    normal = bits - (smallest - (1 << 23))
    if codec & 32:
        normal = (normal + (draws & ((1 << shift) - 1)).to(tl.int32, bitcast=True)) >> shift
        lower = tl.floor(steps)
        up = fraction(draws) < (steps - lower) * 16777216.0
        denormal = lower.to(tl.int32) + up.to(tl.int32)
    else:
        normal = (normal + ((1 << (shift - 1)) - 1) + ((bits >> shift) & 1)) >> shift
        denormal = (steps + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000  # rounded by the sum, ties to even
    return tl.minimum(tl.where(below, denormal, normal), 0x7E if e4m3 else 0x7B)


FUNCTIONS = (fetch_blocks, load_units, spread, decoded, put_blocks, row_maxima, unit_of, codes_of, squares, octaves,
             float_codes)
