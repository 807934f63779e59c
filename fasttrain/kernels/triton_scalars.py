"""Powers and logarithms of double scalars in Triton, and what a prologue does beside a rule's coefficients.

The arithmetic is that of `csrc/cuda/scalars.cuh`, operation by operation, so the results are the same. Here every
argument is a block of numbers, one for each row. Plain functions, wrapped like those of
`fasttrain.kernels.triton_codecs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # bound when the functions are wrapped
    import triton.language as tl


def constant(value: tl.constexpr):
    """A literal would be rounded to fp32."""
    return tl.full((), value, tl.float64)


def number(words):
    """What three words describe: a double, and what lies at the address, if there is one."""
    address = tl.load(words)
    kind = tl.load(words + 1)
    value = tl.load(words + 2).to(tl.float64, bitcast=True)
    there = address != 0
    single = tl.load(address.to(tl.pointer_type(tl.float32)), mask=there & (kind == 0), other=0.0).to(tl.float64)
    double = tl.load(address.to(tl.pointer_type(tl.float64)), mask=there & (kind == 1), other=0.0)
    short = tl.load(address.to(tl.pointer_type(tl.int32)), mask=there & (kind == 2), other=0).to(tl.float64)
    long = tl.load(address.to(tl.pointer_type(tl.int64)), mask=there & (kind == 3), other=0).to(tl.float64)
    byte = tl.load(address.to(tl.pointer_type(tl.uint8)), mask=there & (kind == 4), other=0).to(tl.float64)
    loaded = tl.where(kind == 0, single, tl.where(kind == 1, double, tl.where(
        kind == 2, short, tl.where(kind == 3, long, byte))))
    return tl.where(there, value + loaded, value)


def clip_coefficient(norm, largest):
    """`coefficient` in fasttrain/optim/clip.py."""
    scale = largest / (norm + constant(1e-6))
    return tl.where(scale >= 1.0, constant(1.0), scale)  # NaN stays NaN


def total_scale(scale, grad_scale, norm, max_norm, square, max_each):
    """What the gradients of a row are multiplied with."""
    total = clip_coefficient(norm, max_norm) / grad_scale
    total = total * clip_coefficient(tl.abs(total) * tl.sqrt(square), max_each)
    return total * scale


def integer_power(base, step):
    """Base ** step by repeated squaring, as `fasttrain.rule.Step` computes it."""
    exponent = step.to(tl.int64)
    base, result = tl.broadcast(base, tl.full(step.shape, 1.0, tl.float64))
    factor = base
    for _ in range(0, 64):
        result = tl.where((exponent & 1) == 1, result * factor, result)
        factor = factor * factor
        exponent = exponent >> 1
    return result


def exact_sum(a, b):
    sum = a + b
    other = sum - a
    return sum, (a - (sum - other)) + (b - other)


def exact_product(a, b):
    a_wide = a * constant(134217729.0)
    b_wide = b * constant(134217729.0)
    a_high = a_wide - (a_wide - a)
    b_high = b_wide - (b_wide - b)
    a_low = a - a_high
    b_low = b - b_high
    product = a * b
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def add(a, a_low, b, b_low):
    sum, low = exact_sum(a, b)
    return exact_sum(sum, low + (a_low + b_low))


def multiply(a, a_low, b, b_low):
    product, low = exact_product(a, b)
    return exact_sum(product, low + (a * b_low + a_low * b))


def wide_logarithm(x):
    """Of positive finite numbers, as the sum of two."""
    tiny = x < constant(2.2250738585072014e-308)
    bits = tl.where(tiny, x * constant(18014398509481984.0), x).to(tl.int64, bitcast=True)
    fraction = ((bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    exponent = ((bits >> 52) - tl.where(tiny, 1077, 1023)).to(tl.float64)
    upper = fraction > constant(1.4142135623730951)
    fraction = tl.where(upper, fraction * constant(0.5), fraction)
    exponent = tl.where(upper, exponent + constant(1.0), exponent)
    up = fraction - constant(1.0)
    down, down_low = exact_sum(fraction, constant(1.0))
    quotient = up / down
    back, back_low = exact_product(quotient, down)
    s, s_low = exact_sum(quotient, (((up - back) - back_low) - quotient * down_low) / down)
    z, z_low = multiply(s, s_low, s, s_low)
    tail = constant(1.0 / 31.0)
    tail = constant(1.0 / 29.0) + z * tail
    tail = constant(1.0 / 27.0) + z * tail
    tail = constant(1.0 / 25.0) + z * tail
    tail = constant(1.0 / 23.0) + z * tail
    tail = constant(1.0 / 21.0) + z * tail
    tail = constant(1.0 / 19.0) + z * tail
    tail = constant(1.0 / 17.0) + z * tail
    tail = constant(1.0 / 15.0) + z * tail
    tail = constant(1.0 / 13.0) + z * tail
    tail = constant(1.0 / 11.0) + z * tail
    tail = constant(1.0 / 9.0) + z * tail
    tail = constant(1.0 / 7.0) + z * tail
    sum, low = add(constant(0.2), constant(-1.1102230246251566e-17), z * tail, constant(0.0))
    sum, low = multiply(z, z_low, sum, low)
    sum, low = add(constant(0.3333333333333333), constant(1.850371707708594e-17), sum, low)
    sum, low = multiply(z, z_low, sum, low)
    sum, low = multiply(s * constant(2.0), s_low * constant(2.0), sum, low)
    sum, low = add(s * constant(2.0), s_low * constant(2.0), sum, low)
    whole, whole_low = exact_product(exponent, constant(0.6931471805599453))
    whole, whole_low = exact_sum(whole, whole_low + exponent * constant(2.3190468138462996e-17))
    return add(whole, whole_low, sum, low)


def exponential(x, x_low):
    """E to the power of a sum of two, below 1000 in magnitude."""
    turns = x * constant(1.4426950408889634)
    k = tl.where(turns < 0.0, turns - constant(0.5), turns + constant(0.5)).to(tl.int64)
    count = k.to(tl.float64)
    whole, whole_low = exact_product(count, constant(0.6931471805599453))
    whole, whole_low = exact_sum(whole * -1.0, whole_low * -1.0 - count * constant(2.3190468138462996e-17))
    t, low = add(x, x_low, whole, whole_low)
    tail = constant(1.0 / 20922789888000.0)
    tail = constant(1.0 / 1307674368000.0) + t * tail
    tail = constant(1.0 / 87178291200.0) + t * tail
    tail = constant(1.0 / 6227020800.0) + t * tail
    tail = constant(1.0 / 479001600.0) + t * tail
    tail = constant(1.0 / 39916800.0) + t * tail
    tail = constant(1.0 / 3628800.0) + t * tail
    tail = constant(1.0 / 362880.0) + t * tail
    tail = constant(1.0 / 40320.0) + t * tail
    tail = constant(1.0 / 5040.0) + t * tail
    tail = constant(1.0 / 720.0) + t * tail
    tail = constant(1.0 / 120.0) + t * tail
    tail = constant(1.0 / 24.0) + t * tail
    tail = constant(1.0 / 6.0) + t * tail
    tail = constant(0.5) + t * tail
    first, rest = exact_sum(constant(1.0), t)
    value = first + (rest + (t * t * tail + (low + low * t)))
    half = tl.where(k < 0, -(-k >> 1), k >> 1)  # towards zero, as C++ divides
    return (value * ((half + 1023) << 52).to(tl.float64, bitcast=True)
            * ((k - half + 1023) << 52).to(tl.float64, bitcast=True))


def logarithm(x):
    infinity = constant(float("inf"))
    usual = (x > 0.0) & (x < infinity)
    value, _ = wide_logarithm(tl.where(usual, x, constant(1.0)))
    odd = tl.where(x == 0.0, infinity * -1.0, tl.where(x == infinity, x, constant(float("nan"))))
    return tl.where(usual, value, odd)


def power(base, exponent):
    """Of real numbers; NaN where the base is negative, 1 where the exponent is 0 or the base is 1."""
    infinity = constant(float("inf"))
    base, exponent = tl.broadcast(base, exponent)
    usual = (base > 0.0) & (base < infinity) & (exponent == exponent)
    largest = constant(1180591620717411303424.0)  # 2^70
    bound = tl.where(usual, exponent, constant(0.0))
    bound = tl.where(bound > largest, largest, tl.where(bound < largest * -1.0, largest * -1.0, bound))
    log, log_low = wide_logarithm(tl.where(usual, base, constant(1.0)))
    product, low = exact_product(log, bound)
    x, x_low = exact_sum(product, low + log_low * bound)
    near = usual & (tl.abs(x) < 1000.0)
    value = exponential(tl.where(near, x, constant(0.0)), tl.where(near, x_low, constant(0.0)))
    grows = (base > 1.0) == (exponent > 0.0)
    far = tl.where(grows, infinity, constant(0.0))
    refused = (base < 0.0) | (base != base) | (exponent != exponent)
    value = tl.where(near, value, tl.where(refused, constant(float("nan")), far))
    return tl.where((exponent == 0.0) | (base == 1.0), constant(1.0), value)


FUNCTIONS = (constant, number, clip_coefficient, total_scale, integer_power, exact_sum, exact_product, add, multiply,
             wide_logarithm, exponential, logarithm, power)
