// What a captured step does beside its prologue and its steps: rows of items that draw, which end with the keys of the
// step; chunks that are skipped; and counting. The kernels of the steps are those that the host drives, and know nothing
// of it: a test of a flag in them made ptxas spill.
#pragma once
#include "cuda/prologue.cuh"
#include "draws.h"

namespace fasttrain {
inline namespace FT_ISA {

// Rows of fp32 with keys, a thread for each. One row of the table: addresses of the row without keys, of its skip flag,
// of the row and the flag that are made, and of the count of draws; the length of the row without keys; two halves of
// the key, mix(seed) and mix(identity + kGolden) (fasttrain/precision/draws.py); and the operands that draw, a bit for
// each.
struct Keyed {
  static constexpr int columns = 9;

  HOST_DEVICE static void one(const i64* row) {
    const auto* from = reinterpret_cast<const u32*>(row[0]);
    auto* to = reinterpret_cast<u32*>(row[2]);
    *reinterpret_cast<int*>(row[3]) = *reinterpret_cast<const int*>(row[1]);
    for (i64 i = 0; i < row[5]; ++i) *to++ = from[i];
    const u64 drawn = static_cast<u64>(*reinterpret_cast<const i64*>(row[4]));
    const u64 key = mix(mix(static_cast<u64>(row[6]) + drawn) ^ static_cast<u64>(row[7]));
    for (int operand = 0; row[8] >> operand != 0; ++operand) {
      if ((row[8] >> operand & 1) == 0) continue;
      const u64 own = operand_key(key, operand);
      *to++ = static_cast<u32>(own);
      *to++ = static_cast<u32>(own >> 32);
    }
  }

  HOST_DEVICE static void walk(const i64* table, i64 rows, const void*, Place place) {
    for (i64 row = static_cast<i64>(place.block) * place.threads + place.thread; row < rows;
         row += static_cast<i64>(place.blocks) * place.threads)
      one(table + row * columns);
  }
};

// Chunks whose row is skipped have no elements; of some of them the gradient is zeroed. A thread for each: a step is
// skipped seldom. (The ptxas of CUDA 13.0 ended in a segmentation fault for sm_80 where this kernel was bounded to 256
// threads, was called `mask` and stood after `keyed`.) One row of the table:
// addresses of the chunk's number of elements in the table of its step, and that number; the address of the skip flag;
// the address of the gradient's address, or 0 if it is left as it is; and the bytes of an element of it.
struct Mask {
  static constexpr int columns = 5;

  HOST_DEVICE static void one(const i64* row) {
    const bool skip = *reinterpret_cast<const int*>(row[2]) != 0;
    *reinterpret_cast<i64*>(row[0]) = skip ? 0 : row[1];
    if (!skip || row[3] == 0) return;
    auto* gradient = reinterpret_cast<u16*>(*reinterpret_cast<const i64*>(row[3]));
    const i64 halves = row[1] * row[4] / 2;  // of every dtype a whole number
    for (i64 i = 0; i < halves; ++i) gradient[i] = 0;
  }

  HOST_DEVICE static void walk(const i64* table, i64 rows, const void*, Place place) {
    for (i64 row = static_cast<i64>(place.block) * place.threads + place.thread; row < rows;
         row += static_cast<i64>(place.blocks) * place.threads)
      one(table + row * columns);
  }
};

// Counts go up by one where a step was made, a thread for each. One row of the table: addresses of a count and of a skip
// flag, and the type of the count (`Kind`).
struct Count {
  static constexpr int columns = 3;

  HOST_DEVICE static void one(const i64* row) {
    if (*reinterpret_cast<const int*>(row[1]) != 0) return;
    switch (row[2]) {
      case kFloat: *reinterpret_cast<float*>(row[0]) += 1.0f; break;
      case kDouble: *reinterpret_cast<double*>(row[0]) += 1.0; break;
      case kInt: *reinterpret_cast<int*>(row[0]) += 1; break;
      default: *reinterpret_cast<i64*>(row[0]) += 1; break;
    }
  }

  HOST_DEVICE static void walk(const i64* table, i64 rows, const void*, Place place) {
    for (i64 row = static_cast<i64>(place.block) * place.threads + place.thread; row < rows;
         row += static_cast<i64>(place.blocks) * place.threads)
      one(table + row * columns);
  }
};

}  // namespace FT_ISA
}  // namespace fasttrain

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FT_DRIVEN_KERNEL(Name, Kernel)                                                                      \
  extern "C" __global__ void __launch_bounds__(64)                                     \
  Name(const fasttrain::i64* table, fasttrain::i64 rows) {                                                  \
    using namespace fasttrain;                                                                              \
    Kernel::walk(table, rows, nullptr, Place{threadIdx.x, blockDim.x, blockIdx.x, gridDim.x});              \
  }
#define FT_KEYED_KERNEL(Name) FT_DRIVEN_KERNEL(Name, Keyed)
#define FT_CHUNKS_LEFT_KERNEL(Name) FT_DRIVEN_KERNEL(Name, Mask)
#define FT_COUNT_KERNEL(Name) FT_DRIVEN_KERNEL(Name, Count)
#ifndef FT_ON_DEMAND
FT_CHUNKS_LEFT_KERNEL(chunks_left)
FT_KEYED_KERNEL(keyed)
FT_COUNT_KERNEL(count)
#endif
#endif
