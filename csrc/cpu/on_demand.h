// Rules that are compiled after this module was: each comes in a shared object of its own (fasttrain/kernels/jit.py).
#pragma once
#include "step.h"

namespace fasttrain {

// What such a shared object exports. The name of the symbol is the version of this struct.
constexpr char kExported[] = "fasttrain_rule_1";
struct OnDemand {
  u64 rule_bytes, stream_bytes;  // sizeof(RuleKernels), sizeof(Stream)
  const char* headers;           // hash of the headers that it was compiled with
  const char* isa;
  const RuleKernels* rule;
};

// The last line of such an object's source, after cpu/step_kernel.h, FT_HEADERS and the rule's struct in `fasttrain::own`.
#define FT_EXPORT_RULE(Name)                                                                                      \
  namespace fasttrain {                                                                                           \
  namespace own {                                                                                                 \
  static_assert(Name<float>::states <= kMaxStates, "the rule has more states than kernels take (kMaxStates)");    \
  static_assert(Name<float>::coefficients < kMaxCoefficients, "the rule has more coefficients than kernels take"); \
  static const ::fasttrain::RuleKernels rules[] = {FT_ROW(Name)};                                                 \
  }                                                                                                               \
  }                                                                                                               \
  extern "C" {                                                                                                    \
  __attribute__((visibility("default"))) extern const fasttrain::OnDemand fasttrain_rule_1;                       \
  const fasttrain::OnDemand fasttrain_rule_1{sizeof(fasttrain::RuleKernels), sizeof(fasttrain::Stream), FT_HEADERS, \
                                             FT_TEXT(FT_ISA), fasttrain::own::rules};                             \
  }

// The hash of the headers that this module was compiled with.
const char* headers();

// Loads the rule of that name and digest from a shared object, for as long as the process lives; returns its number.
// Throws std::runtime_error where the object is not of this very build, or holds another rule.
int load_rule(const char* path, const char* name, u32 digest);

// The kernels of a rule, built in or loaded: they never move. Throws std::out_of_range. To be called under the GIL.
const RuleKernels& rule_at(int rule);

}  // namespace fasttrain
