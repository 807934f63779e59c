// Share independent pieces of work out among threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <vector>

#include "common.h"
#include "cpu/threads.h"

namespace fasttrain {

// Calls `piece(i)` once for each i in [0, count). Each thread begins with a stretch of its own, which suits the memory,
// and then helps where work is left. `piece` may not throw.
template <class Piece>
void share(i64 count, int threads, const Piece& piece) {
  struct alignas(64) Stretch {
    std::atomic<i64> next{0};
    i64 end = 0;
  };
  struct Job {
    const Piece& piece;
    std::vector<Stretch> stretches;
    std::atomic<size_t> joined{0};
  };
  const int useful = static_cast<int>(std::min<i64>(std::max(threads, 1), std::max<i64>(count, 1)));
  Job job{piece, std::vector<Stretch>(static_cast<size_t>(useful))};
  for (int t = 0; t < useful; ++t) {
    job.stretches[static_cast<size_t>(t)].next = count * t / useful;
    job.stretches[static_cast<size_t>(t)].end = count * (t + 1) / useful;
  }
  const auto body = [](void* context) {
    Job& job = *static_cast<Job*>(context);
    const FloatingPointMode mode;
    const size_t own = job.joined.fetch_add(1);
    for (size_t s = 0; s < job.stretches.size(); ++s) {
      Stretch& stretch = job.stretches[(own + s) % job.stretches.size()];
      for (i64 i; (i = stretch.next.fetch_add(1, std::memory_order_relaxed)) < stretch.end;) job.piece(i);
    }
  };
  run_on_threads(useful, body, &job);
}

}  // namespace fasttrain
