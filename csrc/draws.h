// Random bits for stochastic rounding, as fasttrain/precision/draws.py defines them.
#pragma once
#include "common.h"

namespace fasttrain {
inline namespace FT_ISA {

constexpr u64 kGolden = 0x9E3779B97F4A7C15ull;  // 2^64 divided by the golden ratio

HOST_DEVICE u64 mix(u64 x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
HOST_DEVICE u64 parameter_key(u64 step_key, u64 identity) { return mix(step_key ^ mix(identity + kGolden)); }
HOST_DEVICE u64 operand_key(u64 parameter_key, int operand) {
  return mix(parameter_key + static_cast<u64>(operand) * kGolden);
}

// What all indices with one upper half share.
struct Drawn {
  u32 before, after;

  HOST_DEVICE Drawn(u64 key, u32 upper)
      : before(static_cast<u32>(key)), after(static_cast<u32>(key >> 32) ^ (upper * 0x9E3779B1u)) {}
  HOST_DEVICE u32 bits(u32 lower) const {
    u32 x = lower + before;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15) ^ after) * 0x846CA68Bu;
    return x ^ (x >> 16);
  }
};

}  // namespace FT_ISA
}  // namespace fasttrain
