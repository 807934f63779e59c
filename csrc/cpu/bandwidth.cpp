#include "cpu/bandwidth.h"

#include <algorithm>
#include <atomic>

#include "cpu/threads.h"

namespace fasttrain {

u32 update_streams(const std::vector<u64>& streams, i64 words, int threads) {
  static constexpr i64 kChunk = 1 << 16;
  static constexpr i64 kRun = 64;
  struct Job {
    const std::vector<u64>& streams;
    i64 words;
    std::atomic<i64> next{0};
    std::atomic<u32> read{0};
  } job{streams, words};
  const auto body = [](void* context) {
    Job& job = *static_cast<Job*>(context);
    for (i64 begin; (begin = job.next.fetch_add(kChunk)) < job.words;) {
      const i64 n = std::min(kChunk, job.words - begin);
      // All streams of a few lines, then the next lines: the access pattern of a step.
      u32 read = 0;
      for (i64 from = begin; from < begin + n; from += kRun) {
        const i64 to = std::min(from + kRun, begin + n);
        const u32* first = reinterpret_cast<const u32*>(job.streams[0]);
        for (i64 i = from; i < to; ++i) read ^= first[i];
        for (size_t s = 1; s < job.streams.size(); ++s) {
          u32* stream = reinterpret_cast<u32*>(job.streams[s]);
          for (i64 i = from; i < to; ++i) stream[i] ^= 1u;
        }
      }
      job.read ^= read;
    }
  };
  run_on_threads(threads, body, &job);
  return job.read;
}

}  // namespace fasttrain
