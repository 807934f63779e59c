// Pass A: sums of squares, and whether any element is infinite or NaN. It reads every element once.
#pragma once
#include <vector>

#include "step.h"

namespace fasttrain {

// The sum of squares of elements [begin, end), at most kSumChunk of them from a multiple of kSumChunk on, by the tree of
// lanes.h. `nonfinite` is set if one of them is infinite or NaN; it is never read off the sum, which may overflow.
using SquaresKernel = double (*)(const Stream& stream, i64 begin, i64 end, bool* nonfinite);

// Defined in cpu/norm.cpp, once per instruction set.
#if defined(FT_X86)
namespace baseline { extern const SquaresKernel squares; }
namespace avx2 { extern const SquaresKernel squares; }
namespace avx512 { extern const SquaresKernel squares; }
#else
namespace portable { extern const SquaresKernel squares; }
#endif

struct Summed {
  Stream stream;
  i64 elements;
};

// One sum for each tensor, by all threads. True if any element is infinite or NaN.
bool sum_squares(const std::vector<Summed>& tensors, double* sums, int threads);

}  // namespace fasttrain
