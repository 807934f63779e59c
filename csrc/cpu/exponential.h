// exp of numbers that are not positive, in vectors as wide as the instruction set's: the same bits in each of them, from
// multiplications and additions alone.
#pragma once
#include "common.h"

namespace fasttrain {
inline namespace FT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
using Reals = float __attribute__((vector_size(4 * kWidth)));
using Bits = int __attribute__((vector_size(4 * kWidth)));

HOST_DEVICE Reals load_reals(const float* from) {
  Reals x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}
HOST_DEVICE void store_reals(float* to, const Reals& x) { __builtin_memcpy(to, &x, sizeof(x)); }

// exp(x) for x <= 0, within 1.1 units of the last place; 0 below -87, where the result leaves the normal numbers; NaN of
// NaN. Of x > 0 it is anything.
//
// x = n ln 2 + r with |r| <= ln(2) / 2 (ln 2 in two parts, the first of which has so few bits that its product with n is
// exact), and e^r = 1 + r + r^2 q(r), where q has the smallest largest relative error of its degree, 4e-9.
HOST_DEVICE Reals exponential(const Reals& x) {
  constexpr float kRound = 0x1.8p23f + 127.0f;  // numbers of this size are whole; the exponent's offset lies in its bits
  const Reals shifted = x * 0x1.715476p0f + kRound;
  const Reals n = shifted - kRound;
  const Reals r = (x - n * 0x1.63p-1f) - n * -0x1.bd0106p-13f;
  Reals q = r * 0x1.6a23dp-10f + 0x1.123a2p-7f;
  q = q * r + 0x1.5558f2p-5f;
  q = q * r + 0x1.555492p-3f;
  q = q * r + 0x1.fffffcp-2f;
  const Reals power = bit_cast<Reals>(bit_cast<Bits>(shifted) << 23);  // 2^n
  const Reals found = (r * r * q + r + 1.0f) * power;
  const Bits tiny = x < -87.0f;  // false of NaN
  return bit_cast<Reals>(bit_cast<Bits>(found) & ~tiny);
}

}  // namespace
}  // namespace FT_ISA
}  // namespace fasttrain
