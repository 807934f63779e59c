// How one element of each storage is read and written. Integer arithmetic, so that every backend gives the same bits;
// compiled for a GPU, the hardware's conversions, which the GPU tests compare with these over all inputs.
#pragma once
#include "common.h"

#if defined(__F16C__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

namespace fasttrain {
inline namespace FT_ISA {

HOST_DEVICE float bf16_to_f32(u16 bits) { return bit_cast<float>(static_cast<u32>(bits) << 16); }

#if defined(__CUDA_ARCH__)
// Two at once, the first in the low half: one instruction, where a single conversion is a slow one on some GPUs.
__device__ __forceinline__ u32 f32_to_bf16_pair(float low, float high) {
  u32 bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ __forceinline__ u16 f32_to_bf16(float x) { return static_cast<u16>(f32_to_bf16_pair(x, 0.0f)); }
#else
// Round to nearest, ties to even; every NaN becomes 0x7FC0 (on a GPU 0x7FFF).
HOST_DEVICE u16 f32_to_bf16(float x) {
  const u32 bits = bit_cast<u32>(x);
  const u32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<u16>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}
HOST_DEVICE u32 f32_to_bf16_pair(float low, float high) {
  return f32_to_bf16(low) | static_cast<u32>(f32_to_bf16(high)) << 16;
}
#endif

#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float f16_to_f32(u16 bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
__device__ __forceinline__ u32 f32_to_f16_pair(float low, float high) {
  u32 bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ __forceinline__ u16 f32_to_f16(float x) { return static_cast<u16>(f32_to_f16_pair(x, 0.0f)); }
#else
// The exponent is moved by a multiplication with a power of two, which is exact and normalises half denormals.
HOST_DEVICE float f16_to_f32(u16 bits) {
  const u32 shifted = static_cast<u32>(bits & 0x7FFFu) << 13;
  const float finite = bit_cast<float>(shifted) * 0x1p112f;
  const u32 magnitude = shifted >= 0x0F800000u ? (shifted | 0x7F800000u) : bit_cast<u32>(finite);
  return bit_cast<float>(magnitude | (static_cast<u32>(bits & 0x8000u) << 16));
}

// Round to nearest, ties to even; overflow to infinity; half denormals are produced; every NaN becomes 0x7E00.
HOST_DEVICE u16 f32_to_f16(float x) {
  const u32 bits = bit_cast<u32>(x), magnitude = bits & 0x7FFFFFFFu;
  // Below 2^-14 the result is denormal: adding 0.5 puts the half's last place at the float's last place.
  const u32 denormal = bit_cast<u32>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  const u32 normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  u32 half = magnitude < 0x38800000u ? denormal : normal;
  half = magnitude >= 0x47800000u ? 0x7C00u : half;
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  return static_cast<u16>(half | ((bits >> 16) & 0x8000u));
}
HOST_DEVICE u32 f32_to_f16_pair(float low, float high) {
  return f32_to_f16(low) | static_cast<u32>(f32_to_f16(high)) << 16;
}
#endif

// One element, by the type that the rule computes in.
template <class T>
HOST_DEVICE T load_element(const void* from, u8 storage, i64 at) {
  switch (storage) {
    case kF32: return static_cast<T>(static_cast<const float*>(from)[at]);
    case kF64: return static_cast<T>(static_cast<const double*>(from)[at]);
    case kBF16: return static_cast<T>(bf16_to_f32(static_cast<const u16*>(from)[at]));
    default: return static_cast<T>(f16_to_f32(static_cast<const u16*>(from)[at]));
  }
}

template <class T>
HOST_DEVICE void store_element(void* to, u8 storage, i64 at, T x) {
  switch (storage) {
    case kF32: static_cast<float*>(to)[at] = static_cast<float>(x); return;
    case kF64: static_cast<double*>(to)[at] = static_cast<double>(x); return;
    case kBF16: static_cast<u16*>(to)[at] = f32_to_bf16(static_cast<float>(x)); return;
    default: static_cast<u16*>(to)[at] = f32_to_f16(static_cast<float>(x)); return;
  }
}

}  // namespace FT_ISA
}  // namespace fasttrain
