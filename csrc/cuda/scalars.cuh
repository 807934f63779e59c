// Powers and logarithms of double scalars, for coefficients that a device computes. Only + - * /, conversions and bits:
// the same result from nvcc, NVRTC, g++ and Triton (fasttrain/kernels/triton_scalars.py retells it), where the math
// libraries differ in the last bit. Real powers and logarithms are within 1 unit in the last place; sums of two doubles
// carry them (Dekker, A floating-point technique for extending the available precision, Numer. Math. 18, 1971).
#pragma once
#include "common.h"

namespace fasttrain {
inline namespace FT_ISA {

// base ** step as Python's `fasttrain.rule.Step` computes it. `step` is not negative.
HOST_DEVICE double integer_power(double base, double step) {
  double result = 1.0;
  for (u64 exponent = static_cast<u64>(step); exponent != 0; exponent >>= 1) {
    if (exponent & 1) result = result * base;
    base = base * base;
  }
  return result;
}

struct Two {  // high + low, of which high is the nearest double
  double high, low;
};

HOST_DEVICE Two exact_sum(double a, double b) {
  const double sum = a + b, other = sum - a;
  return {sum, (a - (sum - other)) + (b - other)};
}

// For factors below 2^990 whose product does not underflow.
HOST_DEVICE Two exact_product(double a, double b) {
  const double a_wide = a * 134217729.0, b_wide = b * 134217729.0;  // 2^27 + 1: halves of 26 bits
  const double a_high = a_wide - (a_wide - a), b_high = b_wide - (b_wide - b);
  const double a_low = a - a_high, b_low = b - b_high, product = a * b;
  return {product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low};
}

HOST_DEVICE Two add(Two a, Two b) {
  const Two sum = exact_sum(a.high, b.high);
  return exact_sum(sum.high, sum.low + (a.low + b.low));
}

HOST_DEVICE Two multiply(Two a, Two b) {
  const Two product = exact_product(a.high, b.high);
  return exact_sum(product.high, product.low + (a.high * b.low + a.low * b.high));
}

// The natural logarithm of a positive finite number, to about 2^-66 of itself.
HOST_DEVICE Two wide_logarithm(double x) {
  const bool tiny = x < 0x1p-1022;
  const u64 bits = bit_cast<u64>(tiny ? x * 0x1p54 : x);
  double fraction = bit_cast<double>((bits & 0x000FFFFFFFFFFFFFull) | 0x3FF0000000000000ull);
  double exponent = static_cast<double>(static_cast<i64>(bits >> 52) - (tiny ? 1023 + 54 : 1023));
  const bool upper = fraction > 1.4142135623730951;
  fraction = upper ? fraction * 0.5 : fraction;
  exponent = upper ? exponent + 1.0 : exponent;
  // log(fraction) = 2 (s + s^3/3 + s^5/5 + ...) with s = (fraction - 1) / (fraction + 1), |s| < 0.1716
  const double up = fraction - 1.0;
  const Two down = exact_sum(fraction, 1.0);
  const double quotient = up / down.high;
  const Two back = exact_product(quotient, down.high);
  const Two s = exact_sum(quotient, (((up - back.high) - back.low) - quotient * down.low) / down.high);
  const Two z = multiply(s, s);
  const double t = z.high;
  double tail = 1.0 / 31.0;
  tail = 1.0 / 29.0 + t * tail;
  tail = 1.0 / 27.0 + t * tail;
  tail = 1.0 / 25.0 + t * tail;
  tail = 1.0 / 23.0 + t * tail;
  tail = 1.0 / 21.0 + t * tail;
  tail = 1.0 / 19.0 + t * tail;
  tail = 1.0 / 17.0 + t * tail;
  tail = 1.0 / 15.0 + t * tail;
  tail = 1.0 / 13.0 + t * tail;
  tail = 1.0 / 11.0 + t * tail;
  tail = 1.0 / 9.0 + t * tail;
  tail = 1.0 / 7.0 + t * tail;
  Two sum = add(Two{0.2, -1.1102230246251566e-17}, Two{t * tail, 0.0});                         // 1/5 + ...
  sum = add(Two{0.3333333333333333, 1.850371707708594e-17}, multiply(z, sum));                  // 1/3 + ...
  const Two twice = {2.0 * s.high, 2.0 * s.low};
  sum = add(twice, multiply(twice, multiply(z, sum)));
  const Two whole = exact_product(exponent, 0.6931471805599453);
  return add(exact_sum(whole.high, whole.low + exponent * 2.3190468138462996e-17), sum);        // exponent log(2)
}

// e ** (x.high + x.low) for |x| < 1000, rounded once or nearly so.
HOST_DEVICE double exponential(Two x) {
  const double turns = x.high * 1.4426950408889634;
  const i64 k = static_cast<i64>(turns < 0.0 ? turns - 0.5 : turns + 0.5);
  const double count = static_cast<double>(k);
  const Two whole = exact_product(count, 0.6931471805599453);
  const Two r = add(x, exact_sum(-whole.high, -whole.low - count * 2.3190468138462996e-17));  // |r| < 0.35
  const double t = r.high;
  double tail = 1.0 / 20922789888000.0;  // 1 / 16!
  tail = 1.0 / 1307674368000.0 + t * tail;
  tail = 1.0 / 87178291200.0 + t * tail;
  tail = 1.0 / 6227020800.0 + t * tail;
  tail = 1.0 / 479001600.0 + t * tail;
  tail = 1.0 / 39916800.0 + t * tail;
  tail = 1.0 / 3628800.0 + t * tail;
  tail = 1.0 / 362880.0 + t * tail;
  tail = 1.0 / 40320.0 + t * tail;
  tail = 1.0 / 5040.0 + t * tail;
  tail = 1.0 / 720.0 + t * tail;
  tail = 1.0 / 120.0 + t * tail;
  tail = 1.0 / 24.0 + t * tail;
  tail = 1.0 / 6.0 + t * tail;
  tail = 0.5 + t * tail;
  const Two first = exact_sum(1.0, t);
  const double value = first.high + (first.low + (t * t * tail + (r.low + r.low * t)));
  const i64 half = k / 2;  // two factors: 2^k alone may be no normal number
  return value * bit_cast<double>(static_cast<u64>(half + 1023) << 52) *
         bit_cast<double>(static_cast<u64>(k - half + 1023) << 52);
}

HOST_DEVICE double infinity() { return bit_cast<double>(0x7FF0000000000000ull); }
HOST_DEVICE double not_a_number() { return bit_cast<double>(0x7FF8000000000000ull); }

HOST_DEVICE double logarithm(double x) {
  const bool usual = x > 0.0 && x < infinity();
  const double value = wide_logarithm(usual ? x : 1.0).high;
  return usual ? value : x == 0.0 ? -infinity() : x == infinity() ? x : not_a_number();
}

// base ** exponent of real numbers; NaN where the base is negative, 1 where the exponent is 0 or the base is 1.
HOST_DEVICE double power(double base, double exponent) {
  if (exponent == 0.0 || base == 1.0) return 1.0;
  if (!(base >= 0.0) || exponent != exponent) return not_a_number();
  const bool grows = (base > 1.0) == (exponent > 0.0);
  if (base == 0.0 || base == infinity()) return grows ? infinity() : 0.0;
  // Beyond this every power of another number than 1 is infinite or zero.
  const double bound = exponent > 0x1p70 ? 0x1p70 : exponent < -0x1p70 ? -0x1p70 : exponent;
  const Two log = wide_logarithm(base);
  const Two product = exact_product(log.high, bound);
  const Two x = exact_sum(product.high, product.low + log.low * bound);
  if (!(absolute(x.high) < 1000.0)) return grows ? infinity() : 0.0;
  return exponential(x);
}

}  // namespace FT_ISA
}  // namespace fasttrain
