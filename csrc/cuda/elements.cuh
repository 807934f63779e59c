// How elements of the plain storages are taken from the registers that hold them as memory does, and put back.
#pragma once
#include "codecs.h"
#include "cuda/walk.cuh"

namespace fasttrain {
inline namespace FT_ISA {

// Puts element e into words whose bits are zero there.
template <int Bytes>
HOST_DEVICE void join(Words& words, int e, Bits<Bytes> bits) {
  words.word[e * Bytes / 4] |= static_cast<u32>(bits) << e * Bytes % 4 * 8;
  if constexpr (Bytes == 8) words.word[e * Bytes / 4 + 1] = static_cast<u32>(bits >> 32);
}

template <class T, u8 S>
HOST_DEVICE T decode(Bits<storage_bytes(S)> bits) {
  if constexpr (S == kF64) return static_cast<T>(bit_cast<double>(bits));
  else if constexpr (S == kF32) return static_cast<T>(bit_cast<float>(bits));
  else if constexpr (S == kBF16) return static_cast<T>(bf16_to_f32(bits));
  else return static_cast<T>(f16_to_f32(bits));
}

template <class T, u8 S>
HOST_DEVICE Bits<storage_bytes(S)> encode(T x) {
  if constexpr (S == kF64) return bit_cast<u64>(static_cast<double>(x));
  else if constexpr (S == kF32) return bit_cast<u32>(static_cast<float>(x));
  else if constexpr (S == kBF16) return f32_to_bf16(static_cast<float>(x));
  else return f32_to_f16(static_cast<float>(x));
}

template <u8 S, class T, int N>
HOST_DEVICE void encode_all(const T (&x)[N], Pack<storage_bytes(S), N>& pack) {
  FT_UNROLL
  for (int e = 0; e < N; e += 2) {
    if constexpr (S == kBF16) pack.set_pair(e, f32_to_bf16_pair(x[e], x[e + 1]));
    else if constexpr (S == kF16) pack.set_pair(e, f32_to_f16_pair(x[e], x[e + 1]));
    else pack.set(e, encode<T, S>(x[e])), pack.set(e + 1, encode<T, S>(x[e + 1]));
  }
}

}  // namespace FT_ISA
}  // namespace fasttrain
