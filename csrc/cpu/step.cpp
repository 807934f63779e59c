// The CPU step: compiled once per instruction set (FT_ISA), everything in that set's own inline namespace.
#include "cpu/step_kernel.h"
#include "rules.h"

namespace fasttrain {
inline namespace FT_ISA {
namespace {

const RuleKernels rules[] = {FASTTRAIN_RULES(FT_ROW)};

}  // namespace
}  // namespace FT_ISA

namespace FT_ISA {
extern const IsaKernels kernels;
const IsaKernels kernels{FT_TEXT(FT_ISA), rules, static_cast<int>(sizeof(rules) / sizeof(rules[0]))};
}  // namespace FT_ISA
}  // namespace fasttrain
