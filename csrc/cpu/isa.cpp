// Which of the compiled instruction sets runs here.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kept.h"
#include "step.h"

namespace fasttrain {
namespace {

struct Candidate {
  const IsaKernels* kernels;
  bool usable;
};

const IsaKernels& choose() {
#if defined(FT_X86)
  __builtin_cpu_init();
  const Candidate candidates[] = {
      {&avx512::kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")},
      {&avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {&baseline::kernels, true},
  };
#else
  const Candidate candidates[] = {{&portable::kernels, true}};
#endif
  const char* forced = std::getenv("FASTTRAIN_ISA");
  std::string known;
  for (const Candidate& candidate : candidates) {
    if (forced == nullptr || *forced == '\0') {
      if (candidate.usable) return *candidate.kernels;
    } else if (candidate.kernels->isa == std::string(forced)) {
      if (candidate.usable) return *candidate.kernels;
      throw std::runtime_error("FASTTRAIN_ISA=" + std::string(forced) +
                               ": this processor lacks it; unset the variable to use the best set that it has");
    }
    known += std::string(known.empty() ? "" : ", ") + candidate.kernels->isa;
  }
  throw std::runtime_error("FASTTRAIN_ISA=" + std::string(forced) + " is not an instruction set of this build; it has " +
                           known);
}

}  // namespace

const IsaKernels& chosen_kernels() {
  static const IsaKernels& chosen = choose();
  return chosen;
}

const KeptKernels& kept_kernels() {
#if defined(FT_X86)
  static const KeptKernels& chosen = &chosen_kernels() == &avx512::kernels ? avx512::kept
                                     : &chosen_kernels() == &avx2::kernels ? avx2::kept : baseline::kept;
  return chosen;
#else
  return portable::kept;
#endif
}

}  // namespace fasttrain
