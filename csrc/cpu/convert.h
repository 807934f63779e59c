// One codec alone, over a whole tensor: what the step does to each of its operands.
#pragma once
#include "cpu/reader.h"

namespace fasttrain {

// Writes fp32 `values` into both arrays of a codec. All are contiguous; `extra` and `draws` (int32: 32 random bits for
// each value) are None where the codec has none. Raises std::invalid_argument if they are not what the codec needs.
void encode(const Reader& reader, int codec, py::handle values, py::handle main, py::handle extra, py::handle draws);

// Reads both arrays of a codec into fp32 `values`.
void decode(const Reader& reader, int codec, py::handle main, py::handle extra, py::handle values);

// Splits the fp32 numbers whose bits are from `first` to `last`, both included, and puts them together again. Returns
// how many come back as they must not: for split16 not exactly, for split8 not as the nearest of 24 bits that is finite
// as they are; NaN not as NaN, in the first array too.
i64 count_broken_splits(int codec, u32 first, u32 last);

}  // namespace fasttrain
