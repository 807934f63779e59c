// How one lane of a warp holds its eight elements of an operand that is not plain. fasttrain/precision/codecs.py defines
// the bits; here are the codecs of the kernels that are compiled ahead of time, in the operations that a GPU has many of.
#pragma once
#include "codecs.h"
#include "cuda/walk.cuh"
#include "draws.h"
#include "operand.h"

namespace fasttrain {
inline namespace FT_ISA {

constexpr int kEach = 8;             // elements of a lane
constexpr int kTile = 32 * kEach;    // of a warp: one block of every codec here

// --- What a GPU has an instruction for ---------------------------------------------------------------------------------
#if defined(__CUDA_ARCH__)
// Bytes of two words, chosen by the digits of `which`: 0 to 3 of the first, 4 to 7 of the second.
__device__ __forceinline__ u32 pick_bytes(u32 a, u32 b, u32 which) { return __byte_perm(a, b, which); }
// Wrong by two places at most, zero for denormals: an estimate.
__device__ __forceinline__ float root_estimate(float x) {
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}
// Between -limit and limit; NaN stays NaN.
__device__ __forceinline__ float clipped(float x, float limit) {
  float within;
  asm("min.NaN.f32 %0, %1, %2;\n\tmax.NaN.f32 %0, %0, %3;" : "=&f"(within) : "f"(x), "f"(limit), "f"(-limit));
  return within;
}
#else
HOST_DEVICE u32 pick_bytes(u32 a, u32 b, u32 which) {
  const u64 both = a | static_cast<u64>(b) << 32;
  u32 chosen = 0;
  for (int i = 0; i < 4; ++i) chosen |= static_cast<u32>(both >> (which >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return chosen;
}
HOST_DEVICE float root_estimate(float x) { return square_root(x); }
HOST_DEVICE float clipped(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }
#endif

// --- Eight neighbouring elements of one array, as they lie in memory ----------------------------------------------------
template <int Bytes>
struct Eight {
  u32 word[2 * Bytes];

  HOST_DEVICE void load(const char* at) {  // at a multiple of 8 * Bytes, or of 16
    if constexpr (Bytes == 1) {
      u64 bits;
      load_bits(at, bits);
      word[0] = static_cast<u32>(bits), word[1] = static_cast<u32>(bits >> 32);
    } else {
      FT_UNROLL
      for (int i = 0; i < Bytes / 2; ++i) {
        const Words four = load_words(at + kAccess * i);
        FT_UNROLL
        for (int w = 0; w < 4; ++w) word[4 * i + w] = four.word[w];
      }
    }
  }
  HOST_DEVICE void store(char* at) const {
    if constexpr (Bytes == 1) {
      store_bits(at, word[0] | static_cast<u64>(word[1]) << 32);
    } else {
      FT_UNROLL
      for (int i = 0; i < Bytes / 2; ++i)
        store_words(at + kAccess * i, Words{{word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]}});
    }
  }
  HOST_DEVICE void load_first(const char* at, u32 count) {  // one by one; zeros after them
    FT_UNROLL
    for (int w = 0; w < 2 * Bytes; ++w) word[w] = 0;
    FT_UNROLL
    for (int e = 0; e < kEach; ++e) {
      Bits<Bytes> bits = 0;
      if (static_cast<u32>(e) < count) load_bits(at + e * Bytes, bits);
      word[e * Bytes / 4] |= static_cast<u32>(bits) << e * Bytes % 4 * 8;
    }
  }
  HOST_DEVICE void store_first(char* at, u32 count) const {
    FT_UNROLL
    for (int e = 0; e < kEach; ++e)
      if (static_cast<u32>(e) < count) store_bits(at + e * Bytes, static_cast<Bits<Bytes>>(get(e)));
  }
  HOST_DEVICE u32 get(int e) const {
    if constexpr (Bytes == 4) return word[e];
    else if constexpr (Bytes == 2) return e % 2 == 0 ? word[e / 2] & 0xFFFFu : word[e / 2] >> 16;
    else return word[e / 4] >> e % 4 * 8 & 0xFFu;
  }
  HOST_DEVICE u32 any() const {  // depends on every access
    u32 bits = word[0];
    FT_UNROLL
    for (int i = 1; i < Bytes / 2; ++i) bits |= word[4 * i];
    return bits;
  }
};

HOST_DEVICE u32 low_halves(u32 a, u32 b) { return pick_bytes(a, b, 0x5410); }
HOST_DEVICE u32 high_halves(u32 a, u32 b) { return pick_bytes(a, b, 0x7632); }
HOST_DEVICE u32 low_bytes(u32 a, u32 b, u32 c, u32 d) {
  return low_halves(pick_bytes(a, b, 0x0040), pick_bytes(c, d, 0x0040));
}

// --- Numbers ------------------------------------------------------------------------------------------------------------
HOST_DEVICE float float_of(u32 bits) { return bit_cast<float>(bits); }
HOST_DEVICE bool finite(u32 bits) { return (bits & 0x7FFFFFFFu) < 0x7F800000u; }
HOST_DEVICE u32 canonical(float x) { return x == x ? bit_cast<u32>(x) : 0x7FC00000u; }

HOST_DEVICE u32 to_24_bits(u32 bits) {  // ties away; a finite number stays finite
  const u32 near = (bits + 0x80u) & ~0xFFu;
  return finite(bits) && !finite(near) ? (bits & 0x80000000u) + 0x7F7FFF00u : near;
}

// The square code of a magnitude in units, in the lowest byte and with the sign of `value`: the largest c with
// (c - 1/2)^2 <= magnitude. The estimate of the root is above it, so that c is right or one too much, and the product,
// which is exact, tells.
HOST_DEVICE u32 square_code(float magnitude, float value) {
  const float c = (root_estimate(magnitude) * (1.0f + 0x1p-20f) + 0x1p23f) - 0x1p23f;  // to the nearest whole number
  const float below = c < 0.5f ? 0.0f : c - 0.5f;
  const float code = below * below > magnitude ? c - 1.0f : c;
  const float with_sign = float_of(bit_cast<u32>(code) | (bit_cast<u32>(value) & 0x80000000u));
  return bit_cast<u32>(with_sign + 0x1.8p23f);
}
HOST_DEVICE float square_value(u32 codes, int e) {  // of a word of codes, each plus 128
  const float c = float_of(pick_bytes(codes, 0x4B000000u, 0x7440u + static_cast<u32>(e))) - (0x1p23f + 128.0f);
  return c * absolute(c);
}

// The octave code: floating-point bits, counted down from one and cut.
HOST_DEVICE u32 octave_code(float magnitude, float value) {
  const int code = static_cast<int>(bit_cast<u32>(magnitude) - (0x3F800000u - (255u << 20)) + (1u << 19)) >> 20;
  return value == 0.0f ? 0u : static_cast<u32>(code < 1 ? 1 : code);
}
HOST_DEVICE float octave_value(u32 code) {
  return float_of(code == 0 ? 0u : (code << 20) + (0x3F800000u - (255u << 20)));
}

// Where a lane's elements lie in the full parameter: element i of the chunk is number origin + i + (lead + i) / run * gap.
struct Run {
  i64 origin, gap;
  u32 lead, run;

  HOST_DEVICE void places(u32 at, u64 (&index)[kEach]) const {
    u64 next = static_cast<u64>(origin) + at;
    if (gap == 0) {
      FT_UNROLL
      for (int e = 0; e < kEach; ++e) index[e] = next + static_cast<u64>(e);
    } else {
      u32 past = lead + at;
      next += past / run * static_cast<u64>(gap);
      past %= run;
      FT_UNROLL
      for (int e = 0; e < kEach; ++e) {
        if (past == run) past = 0, next += static_cast<u64>(gap);
        index[e] = next++;
        ++past;
      }
    }
  }
};

// What a stochastic operand of a chunk draws from.
struct Source {
  Run run;
  u64 key;

  HOST_DEVICE void draw(u32 at, u32 (&bits)[kEach]) const {
    u64 index[kEach];
    run.places(at, index);
    FT_UNROLL
    for (int e = 0; e < kEach; ++e)
      bits[e] = Drawn(key, static_cast<u32>(index[e] >> 32)).bits(static_cast<u32>(index[e]));
  }
};

// --- One operand --------------------------------------------------------------------------------------------------------
// Both arrays of a chunk; `extra` of elements or of units.
struct Arrays {
  char* main;
  char* extra;
};

template <u8 Codec>
struct Lane {
  static constexpr u8 base = base_of(Codec);
  static constexpr bool blocks = block_of(Codec) > 0, paired = extra_size(Codec) > 0 && !blocks;
  static constexpr int main_size = static_cast<int>(main_bytes(Codec, 2) / 2);
  static constexpr int extra_size_of_one = paired ? static_cast<int>(extra_size(Codec)) : 1;
  static constexpr bool copy = base == kMasterBF16;  // the first array, which is not read
  static_assert(base != kInt4, "bytes of two codes are Triton's");
  static_assert(base < kMasterF16 || base == kInt8, "the codecs of these kernels: others are Triton's");
  Eight<main_size> main;
  Eight<extra_size_of_one> extra;  // if paired
  u32 unit;                        // if blocks

  HOST_DEVICE void load(const Arrays& from, u32 at) {
    if constexpr (!copy) main.load(from.main + u64{at} * main_size);
    if constexpr (paired) extra.load(from.extra + u64{at} * extra_size_of_one);
    if constexpr (blocks) load_bits(from.extra + u64{at} / kTile * 4, unit);
  }
  HOST_DEVICE void load_first(const Arrays& from, u32 at, u32 count) {
    if constexpr (!copy) main.load_first(from.main + u64{at} * main_size, count);
    if constexpr (paired) extra.load_first(from.extra + u64{at} * extra_size_of_one, count);
    if constexpr (blocks) load_bits(from.extra + u64{at} / kTile * 4, unit);
  }
  HOST_DEVICE void store(const Arrays& to, u32 at) const {
    main.store(to.main + u64{at} * main_size);
    if constexpr (paired) extra.store(to.extra + u64{at} * extra_size_of_one);
    if constexpr (blocks) store_unit(to, at);
  }
  HOST_DEVICE void store_first(const Arrays& to, u32 at, u32 count) const {
    main.store_first(to.main + u64{at} * main_size, count);
    if constexpr (paired) extra.store_first(to.extra + u64{at} * extra_size_of_one, count);
    if constexpr (blocks) store_unit(to, at);
  }
  HOST_DEVICE void store_unit(const Arrays& to, u32 at) const {  // the first lane for all
    if (at % kTile == 0) store_bits(to.extra + u64{at} / kTile * 4, unit);
  }
  HOST_DEVICE u32 any() const {
    u32 bits = 0;
    if constexpr (!copy) bits |= main.any();
    if constexpr (paired) bits |= extra.any();
    if constexpr (blocks) bits |= unit;
    return bits;
  }

  HOST_DEVICE void decode(float (&x)[kEach]) const {
    FT_UNROLL
    for (int e = 0; e < kEach; ++e) {
      if constexpr (base == kF32) x[e] = float_of(main.get(e));
      else if constexpr (base == kBF16) x[e] = bf16_to_f32(static_cast<u16>(main.get(e)));
      else if constexpr (base == kF16) x[e] = f16_to_f32(static_cast<u16>(main.get(e)));
      else if constexpr (base == kSplit16) x[e] = float_of((main.get(e) << 16) + sign_extended<16>(extra.get(e)));
      else if constexpr (base == kSplit8) x[e] = float_of((main.get(e) << 16) + (sign_extended<8>(extra.get(e)) << 8));
      else if constexpr (base == kMasterBF16) x[e] = float_of(extra.get(e));
      else if constexpr ((Codec & kPositive) != 0) x[e] = octave_value(main.get(e)) * float_of(unit);
      else x[e] = square_value(main.word[e / 4] ^ 0x80808080u, e % 4) * float_of(unit);
    }
  }
  template <int Bits>
  HOST_DEVICE static u32 sign_extended(u32 bits) {
    return static_cast<u32>(static_cast<int>(bits << (32 - Bits)) >> (32 - Bits));
  }

  // Of a block codec, `largest` are the bits of the block's largest magnitude, and any NaN's are above all others.
  // Elsewhere `draws` are random bits for each element, if they are needed.
  HOST_DEVICE void encode(const float (&x)[kEach], [[maybe_unused]] u32 largest,
                          [[maybe_unused]] const u32 (&draws)[kEach]) {
    if constexpr (blocks) encode_block(x, largest);
    else encode_elements(x, draws);
  }

  HOST_DEVICE void encode_elements(const float (&x)[kEach], [[maybe_unused]] const u32 (&draws)[kEach]) {
    static_assert(base == kF32 || base == kBF16 || base == kSplit16 || base == kSplit8 || base == kMasterBF16,
                  "a codec of these kernels");
    u32 bits[kEach];
    FT_UNROLL
    for (int e = 0; e < kEach; ++e) {
      if constexpr (base == kSplit16) bits[e] = canonical(x[e]);
      else if constexpr (base == kSplit8) bits[e] = to_24_bits(canonical(x[e]));
      else if constexpr ((Codec & kStochastic) != 0) bits[e] = at_random(canonical(x[e]), draws[e]);
      else bits[e] = bit_cast<u32>(x[e]);
    }
    FT_UNROLL
    for (int e = 0; e < kEach; ++e) {
      if constexpr (base == kF32) main.word[e] = bits[e];
      if constexpr (base == kMasterBF16) extra.word[e] = bits[e];
    }
    if constexpr (main_size == 2) {
      FT_UNROLL
      for (int e = 0; e < kEach; e += 2) {
        if constexpr (base == kSplit16 || base == kSplit8)
          main.word[e / 2] = high_halves(bits[e] + 0x8000u, bits[e + 1] + 0x8000u);
        else if constexpr ((Codec & kStochastic) != 0)
          main.word[e / 2] = high_halves(bits[e], bits[e + 1]);
        else
          main.word[e / 2] = f32_to_bf16_pair(x[e], x[e + 1]);
        if constexpr (base == kSplit16) extra.word[e / 2] = low_halves(bits[e], bits[e + 1]);
      }
    }
    if constexpr (base == kSplit8) {
      FT_UNROLL
      for (int e = 0; e < kEach; e += 4)
        extra.word[e / 4] = low_bytes(bits[e] >> 8, bits[e + 1] >> 8, bits[e + 2] >> 8, bits[e + 3] >> 8);
    }
  }
  HOST_DEVICE static u32 at_random(u32 bits, u32 draw) { return finite(bits) ? bits + (draw & 0xFFFFu) : bits; }

  static_assert(!blocks || base == kInt8, "the block codes of these kernels");
  HOST_DEVICE void encode_block(const float (&x)[kEach], u32 largest) {
    constexpr bool positive = (Codec & kPositive) != 0;
    float size = float_of(largest);
    if constexpr (!positive) size = size / 16129.0f;
    if (largest != 0 && size < 0x1p-126f) size = 0x1p-126f;
    const bool broken = largest >= 0x7F800000u;
    unit = broken ? 0x7FC00000u : bit_cast<u32>(size);
    main.word[0] = main.word[1] = 0;
    if (broken || largest == 0) return;
    const float inverse = 1.0f / size;
    u32 code[kEach];
    FT_UNROLL
    for (int e = 0; e < kEach; ++e) {
      const float magnitude = absolute(x[e]) * inverse;
      code[e] = positive ? octave_code(magnitude, x[e]) : square_code(magnitude, x[e]);
    }
    FT_UNROLL
    for (int e = 0; e < kEach; e += 4) main.word[e / 4] = low_bytes(code[e], code[e + 1], code[e + 2], code[e + 3]);
  }
};

// The bits of the largest magnitude of a lane's elements.
HOST_DEVICE u32 largest_of(const float (&x)[kEach]) {
  u32 largest = 0;
  FT_UNROLL
  for (int e = 0; e < kEach; ++e) {
    const u32 bits = bit_cast<u32>(x[e]) & 0x7FFFFFFFu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

}  // namespace FT_ISA
}  // namespace fasttrain
