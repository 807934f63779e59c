"""How one operand of a rule (the parameter, the gradient, a state, the EMA) is kept in memory, and what that loses.

A codec has a number, which the kernels share (csrc/codecs.h): the base below, plus `POSITIVE` for a state that is
never negative (block codes only) and `STOCHASTIC` for one that is rounded at random, without bias. This file is the
oracle: it defines the bits, in eager torch, that every kernel must store.

=========  ==========================  =================================================================================
base       arrays                      value
=========  ==========================  =================================================================================
f32 ...    one                         itself, rounded to nearest, ties to even
split16    bf16, 16-bit remainder      exactly an fp32 number: bf16 is its upper half rounded to nearest, ties away
split8     bf16, 8-bit remainder       the upper 24 bits of an fp32 number, rounded to nearest, ties away
master_*   bf16 or fp16, fp32          the fp32 number; the first array is a rounded copy
kahan_*    bf16 or fp16, the same      the sum of both: what the first array's rounding lost is in the second
int8       codes, fp32 unit per block  unit * c * abs(c), c from -127 to 127; if positive, unit * 2^((c - 255) / 8), the
                                       power linear between octaves, c from 1 to 255, and 0 for c = 0
int4       codes, fp32 unit per block  as int8, c from -7 to 7; if positive, unit * 2^(c - 15), c from 1 to 15, and 0;
                                       two codes in a byte, the first in its lower half
e4m3 e5m2  codes, fp32 unit per block  unit * the 8-bit float (OCP; e4m3 without infinities)
=========  ==========================  =================================================================================

Blocks are counted from the first element in row-major order. A unit is the block's largest magnitude divided by the
largest code's value, at least 2^-126. A block in which something is not finite has a NaN for its unit, and reads as NaN
from end to end. A positive value that is not zero never becomes zero, so that nothing is divided by it by accident.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

POSITIVE, STOCHASTIC = 16, 32
SMALLEST_UNIT = 2.0**-126


@dataclass(frozen=True)
class Codec:
    """One way to keep an operand.

    Attributes:
        name: as in the table above.
        number: the base's number.
        main: dtype of the first array; of a positive block code see `code_dtype`.
        extra: dtype of the second array, or None.
        block: elements that share a unit, 0 if each stands alone.
    """

    name: str
    number: int
    main: torch.dtype
    extra: torch.dtype | None = None
    block: int = 0


CODECS = (
    Codec("f32", 0, torch.float32), Codec("f64", 1, torch.float64), Codec("bf16", 2, torch.bfloat16),
    Codec("f16", 3, torch.float16),
    Codec("split16", 4, torch.bfloat16, torch.int16), Codec("split8", 5, torch.bfloat16, torch.int8),
    Codec("master_bf16", 6, torch.bfloat16, torch.float32), Codec("master_f16", 7, torch.float16, torch.float32),
    Codec("kahan_bf16", 8, torch.bfloat16, torch.bfloat16), Codec("kahan_f16", 9, torch.float16, torch.float16),
    Codec("int8", 10, torch.int8, torch.float32, 256), Codec("e4m3", 11, torch.float8_e4m3fn, torch.float32, 256),
    Codec("e5m2", 12, torch.float8_e5m2, torch.float32, 256), Codec("int4", 13, torch.int8, torch.float32, 128),
)
NUMBER = {codec.name: codec.number for codec in CODECS}
PLAIN = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def codec(number: int) -> Codec:
    """The codec of a number, whatever its flags."""
    return CODECS[number & 15]


def code_dtype(number: int) -> torch.dtype:
    """The dtype of the first array."""
    return torch.uint8 if codec(number).main == torch.int8 and number & POSITIVE else codec(number).main


def array_shapes(number: int, shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The shapes of both arrays (None: there is no second) for a parameter of the given shape."""
    kept = codec(number)
    count = shape.numel()
    if not kept.block:
        return tuple(shape), tuple(shape) if kept.extra is not None else None
    main = (-(-count // 2),) if kept.name == "int4" else tuple(shape)
    return main, (-(-count // kept.block),)


def decode(number: int, main: Tensor, extra: Tensor | None, count: int) -> Tensor:
    """The values: flat, in row-major order for block codes, else shaped and ordered like `main`.

    Returns:
        fp64 for f64, else fp32.
    """
    kept = codec(number)
    if number & 15 <= 3:
        return main if kept.name == "f64" else main.float()
    assert extra is not None
    match kept.name:
        case "split16":
            return _float(_bits(main.float()) + extra.to(torch.int64))
        case "split8":
            return _float(_bits(main.float()) + extra.to(torch.int64) * 256)
        case "master_bf16" | "master_f16":
            return extra.clone()
        case "kahan_bf16" | "kahan_f16":
            return main.float() + extra.float()
    codes = _codes(number, main, count)
    units = extra.repeat_interleave(kept.block)[:count]
    if kept.name in FLOATS:
        form = FLOATS[kept.name]
        magnitude = _float((codes & 127) << form.shift) * form.normalise
        return torch.where(codes > 127, -magnitude, magnitude) * units
    if number & POSITIVE:
        top, shift = (15, 23) if kept.name == "int4" else (255, 20)
        values = _float(ONE - ((top - codes) << shift))
        return torch.where(codes == 0, torch.zeros_like(values), values) * units
    return (codes * codes.abs()).float() * units


def encode(number: int, values: Tensor, main: Tensor, extra: Tensor | None, draws: Tensor | None) -> None:
    """Write the values, of the shapes and order that `decode` returns, into both arrays.

    Arguments:
        draws: 32 random bits for each value (`fasttrain.precision.draws`) for a stochastic codec, else None.
    """
    kept = codec(number)
    if number & 15 <= 3:
        main.copy_(values if draws is None else ROUNDED[kept.name](values, draws))
        return
    assert extra is not None
    match kept.name:
        case "split16":
            bits = canonical(values)
            upper = (bits + 0x8000) >> 16
            main.copy_(_float(upper << 16))
            extra.copy_(_signed(bits - (upper << 16), 16))
        case "split8":
            # To 24 bits first; a finite number stays finite, as a split of it must.
            bits = canonical(values)
            largest = (bits & SIGN) + 0x7F7FFF00
            rounded = (bits + 0x80) & ~0xFF
            bits = torch.where(finite(bits) & ~finite(rounded), largest, rounded)
            upper = (bits + 0x8000) >> 16
            main.copy_(_float(upper << 16))
            extra.copy_(_signed((bits - (upper << 16)) >> 8, 8))
        case "master_bf16" | "master_f16":
            main.copy_(values)
            extra.copy_(values)
        case "kahan_bf16" | "kahan_f16":
            main.copy_(values)
            lost = values - main.float()
            extra.copy_(torch.where(torch.isfinite(main), lost, torch.zeros_like(lost)))
        case _:
            _encode_blocks(number, values, main, extra, draws)


def _encode_blocks(number: int, values: Tensor, main: Tensor, units: Tensor, draws: Tensor | None) -> None:
    kept, positive = codec(number), bool(number & POSITIVE)
    count = values.numel()
    padded = torch.nn.functional.pad(values, (0, -count % kept.block)).view(-1, kept.block)
    largest = padded.abs().amax(1) if count else padded.new_zeros(0)  # NaN if there is one
    top = {"int8": 1.0 if positive else 127.0**2, "int4": 1.0 if positive else 49.0, "e4m3": 448.0, "e5m2": 57344.0}
    unit = largest / torch.tensor(top[kept.name])
    unit = torch.where((largest > 0) & (unit < SMALLEST_UNIT), torch.full_like(unit, SMALLEST_UNIT), unit)
    broken = ~torch.isfinite(largest)
    units.copy_(torch.where(broken, torch.full_like(unit, torch.nan), unit))
    usable = (unit > 0) & ~broken
    inverse = torch.where(usable, torch.ones_like(unit) / unit, torch.zeros_like(unit))
    scaled = padded.abs() * inverse[:, None]
    magnitude = torch.where(usable[:, None], scaled, torch.zeros_like(scaled)).flatten()[:count]
    nonzero = torch.where(usable[:, None], padded != 0, False).flatten()[:count]
    if kept.name in FLOATS:
        codes = FLOATS[kept.name].codes(magnitude, draws)
        codes = torch.where(nonzero & (codes == 0), 1, codes) if positive else codes | (_bits(values) >> 31) << 7
    elif positive:
        codes = torch.where(nonzero, _octaves(kept.name, magnitude, draws), 0)
    else:
        codes = _squares(7 if kept.name == "int4" else 127, magnitude, draws)
        codes = torch.where(values < 0, -codes, codes)
    codes = torch.where(nonzero | usable.repeat_interleave(kept.block)[:count], codes, 0)
    if kept.name == "int4":
        nibbles = torch.nn.functional.pad(codes & 15, (0, count % 2)).view(-1, 2)
        main.view(torch.uint8).copy_((nibbles[:, 0] | nibbles[:, 1] << 4).to(torch.uint8))
    else:
        main.view(torch.uint8).copy_((codes & 255).to(torch.uint8).view(main.shape))


def _codes(number: int, main: Tensor, count: int) -> Tensor:
    """int64; signed for the square codes, else 0 to 255."""
    codes = main.reshape(-1).view(torch.uint8).to(torch.int64)
    if codec(number).name == "int4":
        codes = torch.stack([codes & 15, codes >> 4], 1).flatten()[:count]
        return codes if number & POSITIVE else _signed(codes, 4)
    return _signed(codes, 8) if codec(number).name == "int8" and not number & POSITIVE else codes


def _squares(top: int, magnitude: Tensor, draws: Tensor | None) -> Tensor:
    """The codes c whose squares stand for magnitudes from 0 to top^2."""
    if draws is None:  # the largest c with (c - 1/2)^2 <= magnitude; a double root is exact enough to tell
        return (magnitude.double().sqrt() + 0.5).floor().clamp(max=top).to(torch.int64)
    lower = magnitude.double().sqrt().floor().clamp(max=top)
    part = magnitude - (lower * lower).float()
    up = (draws >> 8).float() * (2 * lower + 1).float() < part * 2.0**24
    return (lower.to(torch.int64) + up).clamp(max=top)


def _octaves(name: str, magnitude: Tensor, draws: Tensor | None) -> Tensor:
    """The codes of magnitudes from 0 to 1: their floating-point bits, counted down from one and cut."""
    top, shift = (15, 23) if name == "int4" else (255, 20)
    up = 1 << (shift - 1) if draws is None else draws & ((1 << shift) - 1)
    above = _bits(magnitude.clamp(max=1.0)) - (ONE - (top << shift))
    return ((above + up) >> shift).clamp(1, top)


@dataclass(frozen=True)
class Form:
    """An 8-bit float: where its mantissa lies in the bits of an fp32 number of 2^-bias times its value."""

    shift: int
    normalise: float     # 2^(127 - the float's bias): from those bits to the value
    smallest: float      # normal number
    step: float          # between denormal numbers
    largest: int         # finite code

    def codes(self, magnitude: Tensor, draws: Tensor | None) -> Tensor:
        """Codes without a sign; nearest, ties to even, or at random by `draws`."""
        bits = _bits(magnitude)
        offset = _bits(torch.tensor(self.smallest)).item() - (1 << 23)
        steps = magnitude * torch.tensor(1 / self.step)  # exact where it matters: in denormal codes
        below = magnitude < self.smallest
        if draws is None:
            normal = (bits - offset + (1 << (self.shift - 1)) - 1 + ((bits >> self.shift) & 1)) >> self.shift
            denormal = torch.where(below, steps, torch.zeros_like(steps)).round().to(torch.int64)
        else:
            normal = (bits - offset + (draws & ((1 << self.shift) - 1))) >> self.shift
            lower = torch.where(below, steps, torch.zeros_like(steps)).floor()
            denormal = lower.to(torch.int64) + ((draws >> 8).float() < (steps - lower) * 2.0**24)
        return torch.where(below, denormal, normal).clamp(max=self.largest)


FLOATS = {
    "e4m3": Form(shift=20, normalise=2.0**120, smallest=2.0**-6, step=2.0**-9, largest=0x7E),
    "e5m2": Form(shift=21, normalise=2.0**112, smallest=2.0**-14, step=2.0**-16, largest=0x7B),
}

ONE = 0x3F800000  # the bits of 1.0
SIGN = 0x80000000
INFINITE = 0x7F800000
CANONICAL = 0x7FC00000


def finite(bits: Tensor) -> Tensor:
    """Whether fp32 bits are those of a finite number."""
    return (bits & ~SIGN) < INFINITE


def canonical(values: Tensor) -> Tensor:
    """The bits of fp32 values, 0 to 2^32 - 1; those of every NaN are 0x7FC00000."""
    return torch.where(torch.isnan(values), CANONICAL, _bits(values))


def stochastic_bf16(values: Tensor, draws: Tensor) -> Tensor:
    """To the bf16 number below or above at random, without bias; exact where the value is one."""
    bits = canonical(values)
    return _float(torch.where(finite(bits), bits + (draws & 0xFFFF), bits) & 0xFFFF0000)


def stochastic_f16(values: Tensor, draws: Tensor) -> Tensor:
    """To the fp16 number below or above at random, without bias; exact where the value is one."""
    bits = canonical(values)
    normal = torch.where(finite(bits), bits + (draws & 0x1FFF), bits) & ~0x1FFF
    steps = values.abs() * 2.0**24
    small = values.abs() < 2.0**-14
    lower = torch.where(small, steps, torch.zeros_like(steps)).floor()
    denormal = (lower + ((draws >> 8).float() < (steps - lower) * 2.0**24).float()) * 2.0**-24
    return torch.where(small, torch.copysign(denormal, values), _float(normal))


ROUNDED = {"bf16": stochastic_bf16, "f16": stochastic_f16}


def _bits(values: Tensor) -> Tensor:
    """The bits of fp32 values as int64, 0 to 2^32 - 1."""
    return values.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def _float(bits: Tensor) -> Tensor:
    """fp32 values of bits; what lies above the lowest 32 is ignored."""
    return _signed(bits & 0xFFFFFFFF, 32).to(torch.int32).view(torch.float32)


def _signed(bits: Tensor, width: int) -> Tensor:
    """The lowest `width` bits as a number in two's complement, int64."""
    half = 1 << (width - 1)
    return ((bits + half) & ((1 << width) - 1)) - half
