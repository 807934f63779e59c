// Takes the arrays of a tensor that is not plain, if they are those of its codecs.
#pragma once
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/plan.h"

namespace fasttrain {

constexpr int kTail = 3;  // clip, keep and add: the end of a row

inline char* address(const dlpack::Tensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

// torch's version counter.
i64 version_of(py::handle tensor);

// Raises std::invalid_argument if there is no such codec, or not this number of them.
void describe(Kept* kept, const RuleKernels& rule, bool wide, const std::vector<int>& codecs, bool zero,
              const std::tuple<i64, i64, i64>& place);

// Whether one flat loop can walk it: in row-major order where places count.
bool walkable(const Kept& kept, const Layout& param);

// The first and the second array of an operand; `param` is the layout of the parameter. False if they are not of the
// codec's dtype, not in CPU memory or not laid out like the parameter.
bool take_main(Kept& kept, int operand, const dlpack::Tensor& tensor, const Layout& param);
bool take_extra(Kept& kept, int operand, const dlpack::Tensor& tensor, const Layout& param);

}  // namespace fasttrain
