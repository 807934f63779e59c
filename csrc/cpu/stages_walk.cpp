#include <algorithm>
#include <utility>

#include "cpu/chosen.h"
#include "cpu/lanes.h"
#include "cpu/share.h"
#include "cpu/stages.h"

namespace fasttrain {
namespace {

constexpr i64 kBatch = 1 << 14;  // elements that a thread takes at once, at least
constexpr i64 kTensor = 256;     // what a tensor costs beyond its elements, in elements
constexpr i64 kAlone = 1 << 13;  // elements below which waking a second thread costs more than it brings

// Whether two tensors that are written share memory: then works are done in their order, by one thread.
bool share_memory(const std::vector<Staged>& works) {
  std::vector<std::pair<const char*, const char*>> spans;
  for (const Staged& work : works)
    for (int s = 0; s < 2 + work.stage->states; ++s)
      if (s != 1 && work.elements != 0 && (work.stage->changed >> (s == 0 ? 0 : s - 1) & 1) != 0)
        spans.emplace_back(work.streams[s].at,
                           work.streams[s].at + work.elements * storage_bytes(work.streams[s].storage));
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i)
    if (spans[i].first < spans[i - 1].second) return true;
  return false;
}

}  // namespace

const StagesIsa& chosen_stages() {
  static const StagesIsa& chosen = FT_CHOSEN(stages);
  return chosen;
}

void run_stages(const std::vector<Staged>& works, double* sums, int threads) {
  struct Chunk {
    const Staged* work;
    i64 begin, end;
  };
  std::vector<Chunk> chunks;
  std::vector<i64> first{0}, batches{0};  // first chunk of each work and of each batch
  i64 taken = 0, all = 0;
  for (const Staged& work : works) {
    for (i64 begin = 0; begin < work.elements; begin += kSumChunk) {
      const i64 end = std::min(begin + kSumChunk, work.elements);
      chunks.push_back({&work, begin, end});
      if ((taken += end - begin + kTensor) < kBatch) continue;
      batches.push_back(static_cast<i64>(chunks.size()));
      taken = 0;
    }
    first.push_back(static_cast<i64>(chunks.size()));
    all += work.elements;
  }
  if (batches.back() != static_cast<i64>(chunks.size())) batches.push_back(static_cast<i64>(chunks.size()));
  std::vector<double> partial(chunks.size() * kMaxSums);
  share(static_cast<i64>(batches.size()) - 1, all < kAlone || share_memory(works) ? 1 : threads, [&](i64 batch) {
    for (i64 c = batches[batch]; c < batches[batch + 1]; ++c)
      chunks[c].work->kernel(chunks[c].work->streams, chunks[c].begin, chunks[c].end, chunks[c].work->row,
                             partial.data() + c * kMaxSums);
  });
  const FloatingPointMode mode;
  std::vector<double> branches;
  for (size_t w = 0; w < works.size(); ++w) {
    for (int s = 0; s < kMaxSums; ++s) {
      branches.clear();
      for (i64 c = first[w]; c < first[w + 1]; ++c) branches.push_back(partial[c * kMaxSums + s]);
      sums[w * kMaxSums + s] = s < works[w].stage->sums ? tree(branches.data(), first[w + 1] - first[w]) : 0.0;
    }
    works[w].counter.increment();
  }
}

}  // namespace fasttrain
