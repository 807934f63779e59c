// The ceiling of a step: what this machine's memory gives an in-place update of several streams.
#pragma once
#include <vector>

#include "common.h"

namespace fasttrain {

// Reads `words` 32-bit words of the first stream and flips a bit in each word of the others, in chunks as the walk does.
// Returns what it read, so that no compiler leaves it out. The bytes moved are 4 * words * (1 + 2 * (streams - 1)).
u32 update_streams(const std::vector<u64>& streams, i64 words, int threads);

}  // namespace fasttrain
