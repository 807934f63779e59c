"""How Triton reads and writes operands that are not plain, one element at a time: `fasttrain.precision.codecs` defines
the bits. Codes that share a unit are in `fasttrain.kernels.triton_blocks`.

Plain functions, wrapped like those of `fasttrain.kernels.triton_codecs`. Codecs are compile-time numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # bound when the functions are wrapped
    import triton.language as tl

    from fasttrain.kernels.triton_bits import fraction, load_bits, store_bits
    from fasttrain.kernels.triton_blocks import fetch_blocks, put_blocks
    from fasttrain.kernels.triton_codecs import bfloat16_bits, load, store


def fetch(main, extra, offsets, inside, count, codec: tl.constexpr, wide: tl.constexpr, block: tl.constexpr,
          whole: tl.constexpr, interpreted: tl.constexpr):
    """The values of one operand of a chunk.

    Arguments:
        main, extra: addresses of the chunk's first element in the operand's arrays.
        inside: offsets < count.
        whole: count is `block`, and all arrays are aligned to 16 bytes.
    """
    if codec & 15 <= 3:
        value = load(main, offsets, inside, codec & 15, wide, whole, interpreted)
    elif codec == 4:
        upper = load_bits(main, offsets, inside, 16, whole).to(tl.uint32) << 16
        lower = load_bits(extra, offsets, inside, 16, whole).to(tl.int16, bitcast=True).to(tl.int32)
        value = (upper + lower.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    elif codec == 5:
        upper = load_bits(main, offsets, inside, 16, whole).to(tl.uint32) << 16
        lower = load_bits(extra, offsets, inside, 8, whole).to(tl.int8, bitcast=True).to(tl.int32)
        value = (upper + (lower.to(tl.uint32, bitcast=True) << 8)).to(tl.float32, bitcast=True)
    elif codec == 6 or codec == 7:
        value = load(extra, offsets, inside, 0, False, whole, interpreted)
    elif codec == 8 or codec == 9:
        kept = load(main, offsets, inside, codec - 6, False, whole, interpreted)
        value = kept + load(extra, offsets, inside, codec - 6, False, whole, interpreted)
    else:
        value = fetch_blocks(main, extra, offsets, inside, count, codec, block, whole)
    return value


def put(main, extra, offsets, inside, count, value, bits, codec: tl.constexpr, block: tl.constexpr, whole: tl.constexpr,
        interpreted: tl.constexpr):
    """Write the values of one operand of a chunk; `bits`: 32 random ones for each, if the codec is stochastic."""
    if codec <= 3:
        store(main, offsets, inside, value, codec, whole, interpreted)
    elif codec & 15 <= 3:
        store(main, offsets, inside, at_random(value, bits, codec & 15), codec & 15, whole, interpreted)
    elif codec == 4:
        whole_bits = canonical(value)
        upper = (whole_bits + 0x8000) >> 16
        store_bits(main, offsets, inside, upper, 16, whole)
        store_bits(extra, offsets, inside, whole_bits, 16, whole)  # less upper << 16, which has no lower half
    elif codec == 5:
        cut = to_24_bits(canonical(value))
        store_bits(main, offsets, inside, (cut + 0x8000) >> 16, 16, whole)
        store_bits(extra, offsets, inside, cut >> 8, 8, whole)
    elif codec == 6 or codec == 7:
        store(main, offsets, inside, value, codec - 4, whole, interpreted)
        store(extra, offsets, inside, value, 0, whole, interpreted)
    elif codec == 8 or codec == 9:
        kept = rounded(value, codec - 6, interpreted)
        lost = tl.where(finite(kept.to(tl.uint32, bitcast=True)), value - kept, tl.full((), 0.0, tl.float32))
        store(main, offsets, inside, kept, codec - 6, whole, interpreted)
        store(extra, offsets, inside, lost, codec - 6, whole, interpreted)
    else:
        put_blocks(main, extra, offsets, inside, count, value, bits, codec, block, whole, interpreted)


def finite(bits):
    """Whether fp32 bits are those of a finite number."""
    return (bits & 0x7FFFFFFF) < 0x7F800000


def canonical(value):
    """The bits of fp32 values; one pattern for every NaN."""
    bits = value.to(tl.uint32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, tl.full((), 0x7FC00000, tl.uint32), bits)


def to_24_bits(bits):
    """Rounded to nearest, ties away; a finite number stays finite."""
    near = (bits + 0x80) & 0xFFFFFF00
    largest = (bits & 0x80000000) + 0x7F7FFF00
    return tl.where(finite(bits) & ((near & 0x7FFFFFFF) >= 0x7F800000), largest, near)


def rounded(value, storage: tl.constexpr, interpreted: tl.constexpr):
    """To the nearest bfloat16 (2) or float16 number, in fp32."""
    if storage == 3:
        near = value.to(tl.float16, fp_downcast_rounding="rtne").to(tl.float32)
    elif interpreted:
        near = (bfloat16_bits(value).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        near = value.to(tl.bfloat16, fp_downcast_rounding="rtne").to(tl.float32)
    return near


def at_random(value, draws, storage: tl.constexpr):
    """To the bfloat16 (2) or float16 number below or above, in fp32; float16's overflow is left to the store."""
    bits = canonical(value)
    if storage == 2:
        result = (tl.where(finite(bits), bits + (draws & 0xFFFF), bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        normal = tl.where(finite(bits), bits + (draws & 0x1FFF), bits) & 0xFFFFE000
        small = (bits & 0x7FFFFFFF) < 0x38800000  # 2^-14, below which float16 is denormal
        steps = tl.where(small, tl.abs(value) * 16777216.0, tl.full((), 0.0, tl.float32))
        lower = tl.floor(steps)
        up = fraction(draws) < (steps - lower) * 16777216.0
        denormal = (lower + up.to(tl.float32)) * 5.9604644775390625e-08
        signed = denormal.to(tl.uint32, bitcast=True) | (bits & 0x80000000)
        result = tl.where(small, signed, normal).to(tl.float32, bitcast=True)
    return result


def full_index(offsets, origin, lead, run, gap):
    """Places in the full parameter, 64 bits wide; see `fasttrain.kernels.kept_table`."""
    index = origin + offsets.to(tl.int64)
    if gap != 0:
        index += ((offsets + lead.to(tl.int32)) // run.to(tl.int32)).to(tl.int64) * gap
    return index


def random_bits(index, key):
    """32 for each place, by the two words of a key at an address."""
    x = index.to(tl.uint32) + tl.load(key).to(tl.uint32, bitcast=True)
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x ^ tl.load(key + 1).to(tl.uint32, bitcast=True) ^ ((index >> 32).to(tl.uint32) * 0x9E3779B1)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


def clipped(g, limit):
    """Between -limit and limit; NaN stays NaN."""
    return tl.where(g > limit, limit, tl.where(g < limit * -1.0, limit * -1.0, g))


FUNCTIONS = (fetch, put, finite, canonical, to_24_bits, rounded, at_random, full_index,
             random_bits, clipped)
