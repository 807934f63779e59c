// What was compiled once per instruction set, of the set that runs here.
#pragma once
#include "step.h"

namespace fasttrain {

// FT_CHOSEN(name): `name` in the namespace of the chosen instruction set.
#if defined(FT_X86)
#define FT_CHOSEN(name)                                                  \
  (&chosen_kernels() == &avx512::kernels ? avx512::name                  \
   : &chosen_kernels() == &avx2::kernels ? avx2::name : baseline::name)
#else
#define FT_CHOSEN(name) (portable::name)
#endif

}  // namespace fasttrain
