// One codec alone, over a whole tensor: what the step does to each of its operands.
#pragma once
#include "cpu/plan.h"

namespace fasttrain {

// Writes fp32 `values` into both arrays of a codec. All are contiguous; `extra` and `draws` (int32: 32 random bits for
// each value) are None where the codec has none. Raises std::invalid_argument if they are not what the codec needs.
void encode(const Reader& reader, int codec, py::handle values, py::handle main, py::handle extra, py::handle draws);

// Reads both arrays of a codec into fp32 `values`.
void decode(const Reader& reader, int codec, py::handle main, py::handle extra, py::handle values);

}  // namespace fasttrain
