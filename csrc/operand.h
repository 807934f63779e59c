// How a tensor that is not plain is kept: the numbers of fasttrain/precision/codecs.py, which defines the bits.
#pragma once
#include "common.h"

namespace fasttrain {

// A codec's base. 0 to 3 are those of `Storage`.
enum Base : u8 {
  kSplit16 = 4, kSplit8, kMasterBF16, kMasterF16, kKahanBF16, kKahanF16, kInt8, kE4M3, kE5M2, kInt4, kBases
};
constexpr u8 kBaseMask = 15, kPositive = 16, kStochastic = 32;
constexpr int kCodecs = 64;
constexpr i64 kPiece = 512;   // elements that the CPU stages at once, in the L1 cache: whole blocks of every codec

HOST_DEVICE constexpr u8 base_of(u8 codec) { return codec & kBaseMask; }

// Elements that share a unit; 0 if each stands alone.
HOST_DEVICE constexpr i64 block_of(u8 codec) {
  return base_of(codec) == kInt4 ? 128 : base_of(codec) >= kInt8 ? 256 : 0;
}

// Bytes of the first array.
HOST_DEVICE constexpr i64 main_bytes(u8 codec, i64 elements) {
  const u8 base = base_of(codec);
  return base < kStorages ? elements * storage_bytes(base)
         : base < kInt8   ? elements * 2
         : base == kInt4  ? (elements + 1) / 2
                          : elements;
}

// Elements of the second array, and bytes of one of them; 0 if there is none.
HOST_DEVICE constexpr i64 extra_elements(u8 codec, i64 elements) {
  const i64 block = block_of(codec);
  return base_of(codec) < kStorages ? 0 : block == 0 ? elements : (elements + block - 1) / block;
}
HOST_DEVICE constexpr i64 extra_size(u8 codec) {
  const u8 base = base_of(codec);
  const bool half = base == kSplit16 || base == kKahanBF16 || base == kKahanF16;
  return base < kStorages ? 0 : base == kSplit8 ? 1 : half ? 2 : 4;
}
HOST_DEVICE constexpr i64 extra_bytes(u8 codec, i64 elements) {
  return extra_elements(codec, elements) * extra_size(codec);
}

// Whether there is such a codec: blocks have both flags, the 16-bit numbers may be rounded at random.
HOST_DEVICE constexpr bool is_codec(int number) {
  const u8 base = number & kBaseMask, flags = number & ~kBaseMask;
  return number >= 0 && number < kCodecs && base < kBases &&
         (base >= kInt8 || flags == 0 || (flags == kStochastic && (base == kBF16 || base == kF16)));
}

constexpr int kMaxOperands = kMaxStreams + 1;  // p, g, the states, the EMA

// One operand's two arrays.
struct Operand {
  char* main;
  char* extra;
  u8 codec;
};

// A tensor's operands, and what a step of it does beyond its rule.
struct Kept {
  Operand operands[kMaxOperands] = {};
  int count = 0;      // of operands
  bool zero = false;  // the gradient, once it is read
  u64 key = 0;        // of the parameter in this step (draws.h)
  i64 first = 0, run = 0, pitch = 0;  // element i is the full parameter's first + i / run * pitch + i % run
};

}  // namespace fasttrain
