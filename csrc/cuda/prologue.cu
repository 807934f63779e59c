// The prologue's kernels: one for each computation of coefficients, in float32 and in float64. Compiled as step.cu is.
// The second bound, one block, lets a kernel take the registers that it needs: without it some spill.
#include "cuda/prologue.cuh"

#define FT_PROLOGUE(Name, T, Kept)                                                                            \
  extern "C" __global__ void __launch_bounds__(64, 1)                                                         \
  prologue_##Name##_##Kept(const fasttrain::i64* words, fasttrain::i64 rows, T* out, int* skip, int kept) {   \
    using namespace fasttrain;                                                                                \
    const i64 first = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;                                \
    const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;                                                \
    Prologue<Name, T>::walk(words, rows, out, skip, kept != 0, first, step);                                  \
  }
#define FT_BOTH(Name) FT_PROLOGUE(Name, float, F32) FT_PROLOGUE(Name, double, F64)
FASTTRAIN_COEFFICIENTS(FT_BOTH)
