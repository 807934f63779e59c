// What a step kernel receives, and the table of kernels of one instruction set.
#pragma once
#include "common.h"

namespace fasttrain {

struct Stream {
  char* at;    // first element of the tensor
  u8 storage;  // Storage
};

// Updates elements [begin, end) of one tensor. `streams` is p, g, then the states; `row` is the gradient's scale and
// then the rule's coefficients.
using StepKernel = void (*)(const Stream* streams, i64 begin, i64 end, const double* row);

struct RuleKernels {
  const char* name;
  u32 digest;  // of the equation
  int states;
  int coefficients;
  StepKernel narrow;  // computes in fp32
  StepKernel wide;    // computes in fp64
};

struct IsaKernels {
  const char* isa;
  const RuleKernels* rules;
  int count;
};

// Defined in cpu/step.cpp, once per instruction set.
#if defined(FT_X86)
namespace baseline { extern const IsaKernels kernels; }
namespace avx2 { extern const IsaKernels kernels; }
namespace avx512 { extern const IsaKernels kernels; }
#else
namespace portable { extern const IsaKernels kernels; }
#endif

// The best set that this processor has, or the one that FASTTRAIN_ISA names. Throws std::runtime_error.
const IsaKernels& chosen_kernels();

}  // namespace fasttrain
