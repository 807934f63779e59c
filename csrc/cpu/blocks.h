// Codecs that keep a block of elements as small codes that share a unit.
//
// Every loop is made for the vectoriser: comparisons of integers instead of fmax, truncation or a large addend instead
// of a rounding function, and an estimated code that exact products correct.
#pragma once
#include "cpu/elements.h"

#if defined(__AVX512BW__) && defined(__AVX512DQ__)
#include "cpu/avx512.h"
#define FT_WHOLE 1  // whole blocks have functions of their own
#else
#define FT_WHOLE 0
#endif

namespace fasttrain {
inline namespace FT_ISA {
namespace {

constexpr u32 kOne = 0x3F800000u;  // the bits of 1.0

// What a block code's largest code stands for, in units.
constexpr float top_of(u8 codec) {
  switch (base_of(codec)) {
    case kE4M3: return 448.0f;
    case kE5M2: return 57344.0f;
    default: return (codec & kPositive) != 0 ? 1.0f : base_of(codec) == kInt4 ? 49.0f : 16129.0f;
  }
}

HOST_DEVICE int largest_of(const float* __restrict values, i64 n) {
#if FT_WHOLE
  if (n == kWhole) return largest_of_whole(values);
#endif
  // Magnitudes are ordered as their bits are, and NaN lies above infinity.
  int largest = 0;
  for (i64 i = 0; i < n; ++i) {
    const int magnitude = static_cast<int>(bit_cast<u32>(values[i]) & 0x7FFFFFFFu);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// Writes the unit of every block, and into `inverse` what its elements are multiplied with: 0 where all codes are 0.
template <u8 Codec>
void measure_blocks(const Operand& o, i64 from, i64 n, const float* __restrict values, float* __restrict inverse) {
  constexpr i64 block = block_of(Codec);
  float* __restrict units = reinterpret_cast<float*>(o.extra) + from / block;
  for (i64 b = 0; b * block < n; ++b) {
    const i64 count = n - b * block < block ? n - b * block : block;
    const int largest = largest_of(values + b * block, count);
    float unit = float_of(static_cast<u32>(largest)) / top_of(Codec);
    if (largest > 0 && unit < 0x1p-126f) unit = 0x1p-126f;
    const bool broken = largest >= 0x7F800000;
    units[b] = broken ? float_of(0x7FC00000u) : unit;
    inverse[b] = broken || largest == 0 ? 0.0f : 1.0f / unit;
  }
}

// --- Squares: unit * c * |c| -----------------------------------------------------------------------------------------

// A little below the root of a number up to 2^14, by less than 1/2: an estimate from the bits, and one step of Newton's
// method, which never ends above; 1.49999 instead of 1.5 is for what the products round.
HOST_DEVICE float low_root(float x) {
  const float inverse = float_of(0x5F3759DFu - (bit_cast<u32>(x) >> 1));
  return x * (inverse * (1.49999f - (0.5f * x) * (inverse * inverse)));
}

// The code of a magnitude, without its sign, as a float: the largest c with (c - 1/2)^2 <= magnitude, or 0; at random,
// one of the two c around its root. A low root gives that c or the one before it; products of such small numbers are
// exact, and tell which.
template <bool Random>
HOST_DEVICE float square_code(float magnitude, [[maybe_unused]] u32 draw, [[maybe_unused]] float top) {
  const float root = low_root(magnitude);
  if constexpr (Random) {
    const float near = static_cast<float>(static_cast<int>(root)), next = near + 1.0f;
    const float lower = next * next <= magnitude ? next : near;
    const float part = magnitude - lower * lower;
    const float code = drawn_fraction(draw) * (2.0f * lower + 1.0f) < part * 0x1p24f ? lower + 1.0f : lower;
    return code < top ? code : top;
  } else {
    const float near = root + 0x1p23f;  // rounded to a whole number
    const float between = near - (0x1p23f - 0.5f);
    return between + (between * between <= magnitude ? 0.5f : -0.5f);
  }
}

// --- Octaves: unit * 2^((c - top) / 8), the power linear between octaves ---------------------------------------------

template <int Top, int Shift, bool Random>
HOST_DEVICE int octave_code(float magnitude, [[maybe_unused]] u32 draw) {
  const int above = static_cast<int>(bit_cast<u32>(magnitude) - (kOne - (static_cast<u32>(Top) << Shift)));
  const int up = Random ? static_cast<int>(draw & ((1u << Shift) - 1)) : 1 << (Shift - 1);
  const int code = (above + up) >> Shift;
  const int most = Random && code > Top ? Top : code;
  return most > 1 ? most : 1;
}

// --- 8-bit floats ----------------------------------------------------------------------------------------------------

// Where such a float's mantissa lies in the bits of an fp32 number of 2^-bias times its value.
struct Form {
  int shift;
  float normalise;  // from those bits to the value
  float step;       // between denormal numbers
  u32 offset;       // of the bits of a normal number
  int largest;      // finite code
};
template <u8 Base> constexpr Form form = Base == kE4M3
    ? Form{20, 0x1p120f, 0x1p-9f, 0x3C800000u - (1u << 23), 0x7E}
    : Form{21, 0x1p112f, 0x1p-16f, 0x38800000u - (1u << 23), 0x7B};

template <u8 Base, bool Random>
HOST_DEVICE int float_code(float magnitude, [[maybe_unused]] u32 draw) {
  constexpr Form f = form<Base>;
  const u32 bits = bit_cast<u32>(magnitude);
  constexpr u32 smallest = f.offset + (1u << 23);
  const float steps = float_of(bits < smallest ? bits : smallest) * (1.0f / f.step);
  u32 up;
  int denormal;
  if constexpr (Random) {
    up = draw & ((1u << f.shift) - 1);
    const float lower = static_cast<float>(static_cast<int>(steps));
    denormal = static_cast<int>(steps) + (drawn_fraction(draw) < (steps - lower) * 0x1p24f ? 1 : 0);
  } else {
    up = (1u << (f.shift - 1)) - 1 + ((bits >> f.shift) & 1u);
    denormal = static_cast<int>(bit_cast<u32>(steps + 0x1p23f) & 0xFFu);  // the addition rounds to a whole number
  }
  const u32 normal = (bits - f.offset + up) >> f.shift;
  const int code = static_cast<int>(pick(bits < smallest, static_cast<u32>(denormal), normal));
  return code < f.largest ? code : f.largest;
}

// --- All of them -----------------------------------------------------------------------------------------------------

// The code of a value in a block that is neither zero nor broken.
template <u8 Codec>
HOST_DEVICE u8 code_of(float value, float inverse, u32 draw) {
  constexpr u8 base = base_of(Codec);
  constexpr bool positive = (Codec & kPositive) != 0, random = (Codec & kStochastic) != 0;
  const float magnitude = absolute(value) * inverse;
  if constexpr (base == kE4M3 || base == kE5M2) {
    const int code = float_code<base, random>(magnitude, draw);
    const int sign = static_cast<int>((bit_cast<u32>(value) >> 24) & 0x80u);
    return static_cast<u8>(positive ? (value != 0.0f && code == 0 ? 1 : code) : code | sign);
  } else if constexpr (positive) {
    constexpr int top = base == kInt4 ? 15 : 255, shift = base == kInt4 ? 23 : 20;
    const int code = octave_code<top, shift, random>(magnitude, draw);
    return static_cast<u8>(value != 0.0f ? code : 0);
  } else {
    // The sign is given to the float; an addend leaves a whole number's lowest bits, in two's complement.
    const float code = square_code<random>(magnitude, draw, base == kInt4 ? 7.0f : 127.0f);
    const float with_sign = float_of(bit_cast<u32>(code) | (bit_cast<u32>(value) & 0x80000000u));
    return static_cast<u8>(bit_cast<u32>(with_sign + 0x1.8p23f));
  }
}

template <u8 Codec>
void store_blocks(const Operand& o, i64 from, i64 n, const float* __restrict values, const float* __restrict inverses,
                  const u32* __restrict draws) {
  constexpr i64 block = block_of(Codec);
  constexpr bool random = (Codec & kStochastic) != 0, nibbles = base_of(Codec) == kInt4;
  alignas(64) [[maybe_unused]] u8 staged[nibbles ? kPiece : 1];
  u8* __restrict to = nibbles ? staged : reinterpret_cast<u8*>(o.main) + from;
  for (i64 b = 0; b * block < n; ++b) {
    const i64 begin = b * block, count = n - begin < block ? n - begin : block;
    const float inverse = inverses[b];
    if (inverse == 0.0f) {
      __builtin_memset(to + begin, 0, static_cast<u64>(count));
#if FT_WHOLE
    } else if (Codec == kInt8 && count == kWhole) {
      store_squares_of_whole(to + begin, values + begin, inverse);
#endif
    } else {
      for (i64 i = begin; i < begin + count; ++i) to[i] = code_of<Codec>(values[i], inverse, random ? draws[i] : 0u);
    }
  }
  if constexpr (nibbles) {
    u8* __restrict pairs = reinterpret_cast<u8*>(o.main) + from / 2;
    for (i64 i = 0; i < n / 2; ++i) pairs[i] = static_cast<u8>((staged[2 * i] & 15) | (staged[2 * i + 1] << 4));
    if (n % 2 != 0) pairs[n / 2] = staged[n - 1] & 15;
  }
}

template <u8 Codec>
HOST_DEVICE float value_of(u8 code, float unit) {
  constexpr u8 base = base_of(Codec);
  if constexpr (base == kE4M3 || base == kE5M2) {
    constexpr Form f = form<base>;
    const float signed_bits = float_of((static_cast<u32>(code & 127) << f.shift) | (static_cast<u32>(code >> 7) << 31));
    return signed_bits * f.normalise * unit;
  } else if constexpr ((Codec & kPositive) != 0) {
    constexpr u32 top = base == kInt4 ? 15 : 255, shift = base == kInt4 ? 23 : 20;
    const u32 power = kOne - (top << shift) + (static_cast<u32>(code) << shift);
    return float_of(code == 0 ? 0u : power) * unit;
  } else {
    const float c = static_cast<float>(base == kInt4 ? static_cast<int>(static_cast<u32>(code) << 28) >> 28
                                                     : static_cast<int>(static_cast<signed char>(code)));
    return c * absolute(c) * unit;
  }
}

template <u8 Codec>
void load_blocks(const Operand& o, i64 from, i64 n, float* __restrict to) {
  constexpr i64 block = block_of(Codec);
  constexpr bool nibbles = base_of(Codec) == kInt4;
  alignas(64) [[maybe_unused]] u8 staged[nibbles ? kPiece : 1];
  const u8* __restrict codes = nibbles ? staged : reinterpret_cast<const u8*>(o.main) + from;
  if constexpr (nibbles) {
    const u8* __restrict pairs = reinterpret_cast<const u8*>(o.main) + from / 2;
    for (i64 i = 0; i < (n + 1) / 2; ++i) {
      staged[2 * i] = pairs[i] & 15;
      staged[2 * i + 1] = pairs[i] >> 4;
    }
  }
  const float* __restrict units = reinterpret_cast<const float*>(o.extra) + from / block;
  for (i64 b = 0; b * block < n; ++b) {
    const i64 begin = b * block, count = n - begin < block ? n - begin : block;
    const float unit = units[b];
#if FT_WHOLE
    if (base_of(Codec) == kInt8 && count == kWhole) {
      ((Codec & kPositive) != 0 ? load_octaves_of_whole : load_squares_of_whole)(codes + begin, unit, to + begin);
      continue;
    }
#endif
    for (i64 i = begin; i < begin + count; ++i) to[i] = value_of<Codec>(codes[i], unit);
  }
}

}  // namespace
}  // namespace FT_ISA
}  // namespace fasttrain
