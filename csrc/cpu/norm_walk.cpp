#include <algorithm>
#include <atomic>

#include "cpu/chosen.h"
#include "cpu/lanes.h"
#include "cpu/norm.h"
#include "cpu/share.h"

namespace fasttrain {

bool sum_squares(const std::vector<Summed>& tensors, double* sums, int threads) {
  constexpr i64 kBatch = 1 << 14;  // elements that a thread takes at once, at least
  constexpr i64 kAlone = 1 << 15;  // elements below which waking a second thread costs more than it brings
  struct Chunk {
    const Stream* stream;
    i64 begin, end;
  };
  std::vector<Chunk> chunks;
  std::vector<i64> first{0}, batches{0};  // first chunk of each tensor and of each batch
  i64 taken = 0, elements = 0;
  for (const Summed& tensor : tensors) {
    for (i64 begin = 0; begin < tensor.elements; begin += kSumChunk) {
      const i64 end = std::min(begin + kSumChunk, tensor.elements);
      chunks.push_back({&tensor.stream, begin, end});
      if ((taken += end - begin) >= kBatch) {
        batches.push_back(static_cast<i64>(chunks.size()));
        taken = 0;
      }
    }
    first.push_back(static_cast<i64>(chunks.size()));
    elements += tensor.elements;
  }
  if (batches.back() != static_cast<i64>(chunks.size())) batches.push_back(static_cast<i64>(chunks.size()));

  const SquaresKernel kernel = FT_CHOSEN(squares);
  std::vector<double> partial(chunks.size());
  std::atomic<bool> nonfinite{false};
  share(static_cast<i64>(batches.size()) - 1, elements < kAlone ? 1 : threads, [&](i64 batch) {
    bool found = false;
    for (i64 c = batches[batch]; c < batches[batch + 1]; ++c)
      partial[c] = kernel(*chunks[c].stream, chunks[c].begin, chunks[c].end, &found);
    if (found) nonfinite = true;
  });
  const FloatingPointMode mode;
  for (size_t t = 0; t < tensors.size(); ++t) sums[t] = tree(partial.data() + first[t], first[t + 1] - first[t]);
  return nonfinite;
}

}  // namespace fasttrain
