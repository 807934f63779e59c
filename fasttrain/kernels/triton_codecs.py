"""How Triton reads and writes one block of each storage, and the few operations whose Triton spelling is a trap.

These are plain functions: `fasttrain.kernels.triton` wraps each for the compiler and for the interpreter. Under the
interpreter narrowing is integer arithmetic, because its conversions to bfloat16 truncate; compiled, it is the
hardware's conversion, which the GPU tests compare with ours over all inputs. Storages are numbered as in csrc/common.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # bound when the functions are wrapped: this file can be read where there is no Triton
    import triton.language as tl


def load(address, offsets, keep, storage: tl.constexpr, wide: tl.constexpr, whole: tl.constexpr,
         interpreted: tl.constexpr):
    """One block at `address` (an integer); `whole`: 16-byte aligned, and nothing is masked."""
    if storage == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif storage == 1:
        pointer = address.to(tl.pointer_type(tl.float64))
    elif interpreted:
        pointer = address.to(tl.pointer_type(tl.uint16))
    elif storage == 2:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
    if whole:
        raw = tl.load(tl.multiple_of(pointer, 16) + offsets)
    else:
        raw = tl.load(pointer + offsets, mask=keep)
    if interpreted and storage == 2:
        value = (raw.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif interpreted and storage == 3:
        value = raw.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = raw
    return value.to(tl.float64) if wide else value.to(tl.float32)


def store(address, offsets, keep, value, storage: tl.constexpr, whole: tl.constexpr, interpreted: tl.constexpr):
    """Write one block, rounded to nearest."""
    if storage == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
        raw = value.to(tl.float32)
    elif storage == 1:
        pointer = address.to(tl.pointer_type(tl.float64))
        raw = value.to(tl.float64)
    elif interpreted and storage == 2:
        pointer = address.to(tl.pointer_type(tl.uint16))
        raw = bfloat16_bits(value.to(tl.float32))
    elif interpreted:
        pointer = address.to(tl.pointer_type(tl.uint16))
        raw = value.to(tl.float32).to(tl.float16).to(tl.uint16, bitcast=True)
    elif storage == 2:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
        raw = value.to(tl.float32).to(tl.bfloat16, fp_downcast_rounding="rtne")
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
        raw = value.to(tl.float32).to(tl.float16, fp_downcast_rounding="rtne")
    if whole:
        tl.store(tl.multiple_of(pointer, 16) + offsets, raw)
    else:
        tl.store(pointer + offsets, raw, mask=keep)


def bfloat16_bits(value):
    """Round to nearest, ties to even; every NaN becomes 0x7FC0."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.uint16)


def divide(a, b, wide: tl.constexpr):
    """Correctly rounded: `/` on fp32 is approximate in Triton, and `div_rn` takes nothing but fp32."""
    return a / b if wide else tl.div_rn(a, b)


def square_root(a, wide: tl.constexpr):
    """Correctly rounded."""
    return tl.sqrt(a) if wide else tl.sqrt_rn(a)


def without_denormal(state, wide: tl.constexpr):
    """Zero for what is below the smallest normal number."""
    if wide:
        smallest = tl.full((), 2.2250738585072014e-308, tl.float64)
    else:
        smallest = tl.full((), 1.1754943508222875e-38, tl.float32)
    return tl.where(tl.abs(state) < smallest, tl.full((), 0.0, state.dtype), state)


FUNCTIONS = (load, bfloat16_bits, store, divide, square_root, without_denormal)
