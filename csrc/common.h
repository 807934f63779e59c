// What every source shares: one HOST_DEVICE, integer types of our own (NVRTC has no system headers), and the
// scalar operations that the generated rules call.
#pragma once

#ifndef FT_ISA
#define FT_ISA baseline  // the instruction set that a file is compiled for; step.cpp is compiled once per set
#endif

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fasttrain {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

constexpr int kMaxStates = 6;         // per-element states of one rule
constexpr int kMaxCoefficients = 32;  // width of a coefficient row, the gradient's scale included
constexpr int kMaxStreams = 2 + kMaxStates;

// How the elements of one stream are kept.
enum Storage : u8 { kF32 = 0, kF64 = 1, kBF16 = 2, kF16 = 3, kStorages = 4 };

HOST_DEVICE constexpr int storage_bytes(u8 storage) { return storage == kF64 ? 8 : storage == kF32 ? 4 : 2; }

inline namespace FT_ISA {

template <class To, class From>
HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
#if defined(__CUDA_ARCH__)
  memcpy(&to, &from, sizeof(To));  // NVRTC knows no __builtin_ names
#else
  __builtin_memcpy(&to, &from, sizeof(To));
#endif
  return to;
}

#if defined(__CUDA_ARCH__)
// The _rn forms are correctly rounded whatever the compiler's flags say.
__device__ __forceinline__ float square_root(float x) { return __fsqrt_rn(x); }
__device__ __forceinline__ double square_root(double x) { return __dsqrt_rn(x); }
__device__ __forceinline__ float absolute(float x) { return fabsf(x); }
__device__ __forceinline__ double absolute(double x) { return fabs(x); }
#else
HOST_DEVICE float square_root(float x) { return __builtin_sqrtf(x); }
HOST_DEVICE double square_root(double x) { return __builtin_sqrt(x); }
HOST_DEVICE float absolute(float x) { return __builtin_fabsf(x); }
HOST_DEVICE double absolute(double x) { return __builtin_fabs(x); }
#endif

// A state whose magnitude is below the smallest normal number is kept as zero: denormal tails of decayed moments
// make a CPU step 7 to 18 times slower. A NaN fails the comparison and is kept.
#if defined(__CUDA_ARCH__)
HOST_DEVICE float without_denormal(float x) { return absolute(x) < 0x1p-126f ? 0.0f : x; }
HOST_DEVICE double without_denormal(double x) { return absolute(x) < 0x1p-1022 ? 0.0 : x; }
#else  // by the exponent's bits: processors do twice as many operations of whole numbers as of floats
HOST_DEVICE float without_denormal(float x) { return (bit_cast<u32>(x) & 0x7F800000u) == 0 ? 0.0f : x; }
HOST_DEVICE double without_denormal(double x) { return (bit_cast<u64>(x) & 0x7FF0000000000000ull) == 0 ? 0.0 : x; }
#endif

}  // namespace FT_ISA
}  // namespace fasttrain
