// The step of a tensor that is not plain, as `kept.cpp` compiles it for each instruction set.
#pragma once
#include "operand.h"
#include "step.h"

namespace fasttrain {

// Functions of one codec, over at most kPiece elements from a multiple of kPiece on. Null: there is no such codec.
template <class T>
struct Codec {
  void (*load)(const Operand&, i64 from, i64 n, T* to);
  // Of block codes only, before `store`: writes the units.
  void (*measure)(const Operand&, i64 from, i64 n, const T* values, float* inverse);
  void (*store)(const Operand&, i64 from, i64 n, const T* values, const float* inverse, const u32* draws);
};

struct KeptKernels {
  // Updates elements [begin, end), begin a multiple of kPiece, with a row that ends with clip, keep and add.
  using Step = void (*)(const RuleKernels& rule, const Kept& kept, i64 begin, i64 end, const double* row);
  Step narrow, wide;
  const Codec<float>* codecs;        // by number
  const Codec<double>* wide_codecs;  // of tensors that are computed in fp64
};

// Defined in cpu/kept.cpp, once per instruction set.
#if defined(FT_X86)
namespace baseline { extern const KeptKernels kept; }
namespace avx2 { extern const KeptKernels kept; }
namespace avx512 { extern const KeptKernels kept; }
#else
namespace portable { extern const KeptKernels kept; }
#endif

// Those of the instruction set in use.
const KeptKernels& kept_kernels();

}  // namespace fasttrain
