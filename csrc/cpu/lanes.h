// The order in which sums of many numbers are made, so that they have the same bits whatever the instruction set, the
// number of threads and the division of the work (numerics.md, contract 3):
//
// - a tensor's elements, in the order of memory, are cut into blocks of 4,096 from its start;
// - in a block, element i is added in double to lane i % 16, in order; an absent element counts as zero;
// - lanes, then the blocks of a tensor, then tensors, are combined by a tree: neighbours in pairs, level by level,
//   where the last of an odd number is handed up as it is.
#pragma once
#include "common.h"

namespace fasttrain {

constexpr int kLanes = 16;
constexpr i64 kSumBlock = 4096;
constexpr i64 kSumChunk = 16 * kSumBlock;  // a power of two of blocks: its tree is a branch of its tensor's

inline namespace FT_ISA {

// Overwrites the numbers.
HOST_DEVICE double tree(double* x, i64 n) {
  if (n == 0) return 0.0;
  while (n > 1) {
    const i64 pairs = n / 2;
    for (i64 i = 0; i < pairs; ++i) x[i] = x[2 * i] + x[2 * i + 1];
    if (n % 2 != 0) x[pairs] = x[n - 1];
    n = pairs + n % 2;
  }
  return x[0];
}

// What is added for an element: its square, or the element itself.
struct Square {
  HOST_DEVICE static double of(double x) { return x * x; }
};
struct Itself {
  HOST_DEVICE static double of(double x) { return x; }
};

// Adds n elements, the first of which is a multiple of kLanes from the block's start.
template <class What, class T>
HOST_DEVICE void add_to_lanes(double* __restrict to, const T* __restrict from, i64 n) {
  double lanes[kLanes];
  for (int j = 0; j < kLanes; ++j) lanes[j] = to[j];
  const i64 whole = n / kLanes * kLanes;
  for (i64 i = 0; i < whole; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] += What::of(static_cast<double>(from[i + j]));
  for (int j = 0; j < kLanes; ++j) to[j] = lanes[j];
  for (i64 i = whole; i < n; ++i) to[i - whole] += What::of(static_cast<double>(from[i]));
}

}  // namespace FT_ISA
}  // namespace fasttrain
