"""Integers in memory and random fractions, in Triton: what both kinds of kept operands need.

Plain functions, wrapped like those of `fasttrain.kernels.triton_codecs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # bound when the functions are wrapped
    import triton.language as tl


def load_bits(address, offsets, inside, width: tl.constexpr, whole: tl.constexpr):
    """Unsigned integers; zeros outside."""
    if width == 8:
        pointer = address.to(tl.pointer_type(tl.uint8))
    else:
        pointer = address.to(tl.pointer_type(tl.uint16))
    if whole:
        raw = tl.load(tl.multiple_of(pointer, 16) + offsets)
    else:
        raw = tl.load(pointer + offsets, mask=inside, other=0)
    return raw


def store_bits(address, offsets, inside, bits, width: tl.constexpr, whole: tl.constexpr):
    """The lowest bits of integers."""
    if width == 8:
        pointer = address.to(tl.pointer_type(tl.uint8))
        raw = (bits & 0xFF).to(tl.uint8)
    else:
        pointer = address.to(tl.pointer_type(tl.uint16))
        raw = (bits & 0xFFFF).to(tl.uint16)
    if whole:
        tl.store(tl.multiple_of(pointer, 16) + offsets, raw)
    else:
        tl.store(pointer + offsets, raw, mask=inside)


def fraction(draws):
    """The upper 24 random bits, as a whole number in fp32."""
    return (draws >> 8).to(tl.int32, bitcast=True).to(tl.float32)


FUNCTIONS = (load_bits, store_bits, fraction)
