// The CUDA kernels' own text, compiled for the host, so that tests run it where there is no GPU.
#pragma once
#include "common.h"

namespace fasttrain {

struct HostKernel {
  const char* name;  // as in step.fatbin
  bool wide;         // coefficients are doubles, else floats
  int columns;       // of the chunk table
  int coefficients;  // in a row, the gradient's scale included; 0: the third argument is memory that is written
  void (*walk)(const i64* table, i64 chunks, const void* rows, const i64* gradients, u32 thread, u32 threads, u32 block,
               u32 blocks);
};

extern const HostKernel host_kernels[];
extern const int host_kernel_count;

// What the walks of this thread did since it was last cleared.
struct Accesses { i64 wide = 0, narrow = 0; };  // of 16 bytes, and of one element
extern thread_local Accesses accesses;

}  // namespace fasttrain
