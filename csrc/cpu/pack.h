// Moving numbers between storages in one pass (scaled, and with what a rounding lost carried over to the next time), and
// adding the chunks of several ranks: what runs under an all-reduce of gradients.
#pragma once
#include <vector>

#include "cpu/kept.h"

namespace fasttrain {

// to = round(from * scale + lost), and lost = what that rounding took away, or 0 where `to` is not finite. `from` and
// `to` may be the same memory; then their elements are of one size.
struct Move {
  Operand from, to, lost;
  i64 elements;
  double scale;
  bool feedback;  // there is a `lost`
  bool wide;      // computed in fp64, else in fp32
};

// to = round((((chunk 0 + chunk 1) + chunk 2) + ...) * scale).
struct Sum {
  std::vector<Operand> chunks;
  Operand to;
  i64 elements;
  double scale;
  bool wide;
};

// Of elements [begin, end), begin a multiple of kPiece.
struct PackKernels {
  void (*move)(const Move& move, i64 begin, i64 end);
  void (*sum)(const Sum& sum, i64 begin, i64 end);
};

// Defined in cpu/pack.cpp, once per instruction set.
#if defined(FT_X86)
namespace baseline { extern const PackKernels pack; }
namespace avx2 { extern const PackKernels pack; }
namespace avx512 { extern const PackKernels pack; }
#else
namespace portable { extern const PackKernels pack; }
#endif

// All of the moves, in any order, by all threads.
void move_all(const std::vector<Move>& moves, int threads);

// If `squares` is not null it gets the sum of squares of what is stored, by the tree of lanes.h; true if any element of
// it is infinite or NaN.
bool sum_chunks(const Sum& sum, double* squares, int threads);

}  // namespace fasttrain
