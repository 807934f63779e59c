// Codecs whose elements stand alone: one loop for each, over at most kPiece elements.
#pragma once
#include "codecs.h"
#include "operand.h"

namespace fasttrain {
inline namespace FT_ISA {
namespace {

HOST_DEVICE float float_of(u32 bits) { return bit_cast<float>(bits); }

// The bits of a number; those of every NaN are the same.
HOST_DEVICE u32 canonical(float x) {
  const u32 bits = bit_cast<u32>(x);
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC00000u : bits;
}
// a if the condition holds, else b: by a mask, where GCC would make two choices on one condition a branch, and the loop
// would not be vectorised.
HOST_DEVICE u32 pick(bool condition, u32 a, u32 b) {
  const u32 mask = 0u - static_cast<u32>(condition);
  return (a & mask) | (b & ~mask);
}
HOST_DEVICE bool finite(u32 bits) { return (bits & 0x7FFFFFFFu) < 0x7F800000u; }

// A whole number below 2^24 drawn at random, to be compared with a fraction times 2^24.
HOST_DEVICE float drawn_fraction(u32 draw) { return static_cast<float>(static_cast<int>(draw >> 8)); }

HOST_DEVICE u16 random_bf16(float x, u32 draw) {
  const u32 bits = canonical(x);
  return static_cast<u16>((bits + (finite(bits) ? draw & 0xFFFFu : 0u)) >> 16);
}

HOST_DEVICE u16 random_f16(float x, u32 draw) {
  const u32 bits = canonical(x);
  const u32 normal = (bits + (finite(bits) ? draw & 0x1FFFu : 0u)) & ~0x1FFFu;
  const u32 magnitude = bits & 0x7FFFFFFFu;
  constexpr u32 smallest = 0x38800000u;  // 2^-14
  const float steps = float_of(magnitude < smallest ? magnitude : smallest) * 0x1p24f;
  const int lower = static_cast<int>(steps);
  const int up = drawn_fraction(draw) < (steps - static_cast<float>(lower)) * 0x1p24f ? 1 : 0;
  const u32 rounded = normal & 0x7FFFFFFFu;  // a number of fp16, but perhaps too large
  const u32 fits = pick(rounded >= 0x47800000u, 0x7C00u, (rounded - 0x38000000u) >> 13);
  const u32 large = pick(rounded > 0x7F800000u, 0x7E00u, fits);
  return static_cast<u16>(pick(magnitude < smallest, static_cast<u32>(lower + up), large) | ((bits >> 16) & 0x8000u));
}

template <u8 Base>
HOST_DEVICE u16 to_half(float x) { return Base == kBF16 ? f32_to_bf16(x) : f32_to_f16(x); }
template <u8 Base>
HOST_DEVICE float from_half(u16 bits) { return Base == kBF16 ? bf16_to_f32(bits) : f16_to_f32(bits); }

template <u8 Codec, class T>
void load_elements(const Operand& o, i64 from, i64 n, T* __restrict to) {
  for (i64 i = 0; i < n; ++i) to[i] = load_element<T>(o.main, Codec, from + i);
}

template <u8 Codec, class T>
void store_elements(const Operand& o, i64 from, i64 n, const T* __restrict values, const float*,
                    const u32* __restrict draws) {
  if constexpr ((Codec & kStochastic) != 0) {
    u16* __restrict to = reinterpret_cast<u16*>(o.main) + from;
    for (i64 i = 0; i < n; ++i)
      to[i] = base_of(Codec) == kBF16 ? random_bf16(values[i], draws[i]) : random_f16(values[i], draws[i]);
  } else {
    for (i64 i = 0; i < n; ++i) store_element(o.main, Codec, from + i, values[i]);
  }
}

// --- bf16 and what it lacks of an fp32 number ------------------------------------------------------------------------

template <class Lower, int Shift>
void load_split(const Operand& o, i64 from, i64 n, float* __restrict to) {
  const u16* __restrict upper = reinterpret_cast<const u16*>(o.main) + from;
  const Lower* __restrict lower = reinterpret_cast<const Lower*>(o.extra) + from;
  for (i64 i = 0; i < n; ++i)
    to[i] = float_of((static_cast<u32>(upper[i]) << 16) + (static_cast<u32>(static_cast<int>(lower[i])) << Shift));
}

// The remainder is the number's lower bits: the upper half was rounded up where they are negative.
template <class Lower, int Shift>
void store_split(const Operand& o, i64 from, i64 n, const float* __restrict values, const float*, const u32*) {
  u16* __restrict upper = reinterpret_cast<u16*>(o.main) + from;
  Lower* __restrict lower = reinterpret_cast<Lower*>(o.extra) + from;
  for (i64 i = 0; i < n; ++i) {
    u32 bits = canonical(values[i]);
    if constexpr (Shift == 8) {
      const bool last = (bits & 0x7FFFFFFFu) - 0x7F7FFF80u < 0x80u;  // finite, and would be rounded to infinity
      bits = (bits + (last ? 0u : 0x80u)) & ~0xFFu;
    }
    upper[i] = static_cast<u16>((bits + 0x8000u) >> 16);
    lower[i] = static_cast<Lower>(bits >> Shift);
  }
}

// --- A rounded copy of an fp32 master --------------------------------------------------------------------------------

inline void load_master(const Operand& o, i64 from, i64 n, float* __restrict to) {
  __builtin_memcpy(to, o.extra + from * 4, static_cast<u64>(n) * 4);
}

template <u8 Half>
void store_master(const Operand& o, i64 from, i64 n, const float* values, const float*, const u32*) {
  u16* __restrict to = reinterpret_cast<u16*>(o.main) + from;
  float* master = reinterpret_cast<float*>(o.extra) + from;
  if (values != master) __builtin_memcpy(master, values, static_cast<u64>(n) * 4);
  for (i64 i = 0; i < n; ++i) to[i] = to_half<Half>(values[i]);
}

// --- Two 16-bit numbers whose sum it is ------------------------------------------------------------------------------

template <u8 Half>
void load_kahan(const Operand& o, i64 from, i64 n, float* __restrict to) {
  const u16* __restrict main = reinterpret_cast<const u16*>(o.main) + from;
  const u16* __restrict lost = reinterpret_cast<const u16*>(o.extra) + from;
  for (i64 i = 0; i < n; ++i) to[i] = from_half<Half>(main[i]) + from_half<Half>(lost[i]);
}

template <u8 Half>
void store_kahan(const Operand& o, i64 from, i64 n, const float* __restrict values, const float*, const u32*) {
  u16* __restrict main = reinterpret_cast<u16*>(o.main) + from;
  u16* __restrict lost = reinterpret_cast<u16*>(o.extra) + from;
  for (i64 i = 0; i < n; ++i) main[i] = to_half<Half>(values[i]);
  for (i64 i = 0; i < n; ++i) {
    const float kept = from_half<Half>(main[i]);
    lost[i] = to_half<Half>(float_of(pick(finite(bit_cast<u32>(kept)), bit_cast<u32>(values[i] - kept), 0u)));
  }
}

}  // namespace
}  // namespace FT_ISA
}  // namespace fasttrain
