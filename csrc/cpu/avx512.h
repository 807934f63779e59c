// The loops of the hottest codecs, for which GCC 12 makes more instructions than they need: the same bits, in vectors by
// name. Each function takes a whole block of 256 elements; `blocks.h` has them for every other case.
#pragma once
#include <immintrin.h>

#include "common.h"

namespace fasttrain {
inline namespace FT_ISA {
namespace {

constexpr i64 kWhole = 256;

using Floats = float __attribute__((vector_size(64)));
using Ints = int __attribute__((vector_size(64)));
constexpr u16 kAll = 0xFFFF;  // all lanes of a masked operation: of those without a mask GCC 12 warns in its own header

template <class Vector>
HOST_DEVICE Vector load_vector(const void* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof(Vector));
  return vector;
}
template <class Vector>
HOST_DEVICE void store_vector(void* to, const Vector& vector) { __builtin_memcpy(to, &vector, sizeof(Vector)); }

HOST_DEVICE Ints larger(const Ints& a, const Ints& b) { return a > b ? a : b; }

// The largest magnitude's bits. In four lines, so that no maximum waits for the one before it.
inline int largest_of_whole(const float* values) {
  Ints largest[4] = {};
  for (i64 i = 0; i < kWhole; i += 64)
    for (int j = 0; j < 4; ++j) largest[j] = larger(largest[j], load_vector<Ints>(values + i + 16 * j) & 0x7FFFFFFF);
  int lanes[16], found = 0;
  store_vector(lanes, larger(larger(largest[0], largest[1]), larger(largest[2], largest[3])));
  for (int lane : lanes) found = lane > found ? lane : found;
  return found;
}

// int8's square codes to nearest, as `square_code` of blocks.h gives them; the low root is from an estimate of 14 bits.
inline void store_squares_of_whole(u8* to, const float* values, float inverse) {
  for (i64 i = 0; i < kWhole; i += 16) {
    const Ints value = load_vector<Ints>(values + i);
    const Floats magnitude = bit_cast<Floats>(value & 0x7FFFFFFF) * inverse;
    const Ints bits = bit_cast<Ints>(magnitude), tiny = Ints{} + 0x30000000;  // the estimate for 0 is infinite
    const Floats positive = bit_cast<Floats>(larger(bits, tiny));
    const Floats estimate = bit_cast<Floats>(_mm512_maskz_rsqrt14_ps(kAll, bit_cast<__m512>(positive)));
    const Floats near = positive * 0.9995f * estimate + 0x1p23f;
    const Floats between = near - (0x1p23f - 0.5f);
    const u16 above = _mm512_cmp_ps_mask(between * between, magnitude, _CMP_LE_OQ);
    const u16 negative = _mm512_movepi32_mask(bit_cast<__m512i>(value));
    __m512i code = bit_cast<__m512i>(near);
    code = _mm512_mask_add_epi32(code, above, code, bit_cast<__m512i>(Ints{} + 1));
    code = _mm512_mask_sub_epi32(code, negative, __m512i{}, code);
    store_vector(to + i, _mm512_maskz_cvtepi32_epi8(kAll, code));
  }
}

inline void load_squares_of_whole(const u8* codes, float unit, float* to) {
  for (i64 i = 0; i < kWhole; i += 16) {
    const Ints code = bit_cast<Ints>(_mm512_maskz_cvtepi8_epi32(kAll, load_vector<__m128i>(codes + i)));
    const Floats c = __builtin_convertvector(code, Floats);
    store_vector(to + i, c * bit_cast<Floats>(bit_cast<Ints>(c) & 0x7FFFFFFF) * unit);
  }
}

inline void load_octaves_of_whole(const u8* codes, float unit, float* to) {
  for (i64 i = 0; i < kWhole; i += 16) {
    const Ints code = bit_cast<Ints>(_mm512_maskz_cvtepu8_epi32(kAll, load_vector<__m128i>(codes + i)));
    const Ints power = (code << 20) + (0x3F800000 - (255 << 20));
    store_vector(to + i, bit_cast<Floats>(code == 0 ? Ints{} : power) * unit);
  }
}

}  // namespace
}  // namespace FT_ISA
}  // namespace fasttrain
