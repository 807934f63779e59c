// Stages of optimizers with reductions: a rule over elements whose terms are summed in the same walk, by the tree of
// lanes.h. What a stage does not change is not written.
#pragma once
#include <vector>

#include "cpu/walk.h"

namespace fasttrain {

constexpr int kMaxSums = 4;

// Elements [begin, end), at most kSumChunk of them from a multiple of kSumChunk on; one number for each sum.
using StageKernel = void (*)(const Stream* streams, i64 begin, i64 end, const double* row, double* sums);

struct StageKernels {
  const char* name;
  u32 digest;
  int states, coefficients, sums;
  u32 changed;  // of p and the states, bit by bit
  StageKernel narrow, wide;
};

struct StagesIsa {
  const StageKernels* stages;
  int count;
};

// Defined in cpu/stages.cpp, once per instruction set.
#if defined(FT_X86)
namespace baseline { extern const StagesIsa stages; }
namespace avx2 { extern const StagesIsa stages; }
namespace avx512 { extern const StagesIsa stages; }
#else
namespace portable { extern const StagesIsa stages; }
#endif

const StagesIsa& chosen_stages();

struct Staged {
  const StageKernels* stage = nullptr;
  StageKernel kernel = nullptr;
  Stream streams[kMaxStreams] = {};
  i64 elements = 0;
  const double* row = nullptr;
  Counter counter;
};

// kMaxSums numbers for each work, those that its stage has not being zero.
void run_stages(const std::vector<Staged>& works, double* sums, int threads);

}  // namespace fasttrain
