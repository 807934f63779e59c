// Takes the tensors of a parameter into what the walk works on, if the kernels can.
#pragma once
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/reader.h"
#include "cpu/walk.h"

namespace fasttrain {

constexpr int kTail = 3;  // clip, keep and add: the end of a row

inline char* address(const dlpack::Tensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

// kNone if it is not one number in CPU memory that steps can be counted in.
Counter::Type counter_type(const dlpack::Tensor& tensor);

// A step count that is one number in CPU memory. Raises if it is not.
Counter counter_of(const Reader& reader, py::handle tensor);

// Takes one of p, g and the states of a plain parameter. False if the kernels cannot.
bool take(Work& work, int stream, const dlpack::Tensor& tensor, const Layout& layout, const Kind& param);

// What the walk has to know beside the tensors.
void prepare(Work& work, const RuleKernels& rule, bool wide, const Layout& layout, const Kind& param);

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
