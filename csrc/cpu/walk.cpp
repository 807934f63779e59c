#include "cpu/walk.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "cpu/threads.h"

namespace fasttrain {
namespace {

constexpr i64 kChunk = 1 << 16;  // elements of one unit: long enough for prefetchers, short enough to share
static_assert(kChunk % kPiece == 0, "a unit begins with a block of every codec");
constexpr i64 kBatch = 1 << 14;  // elements that a thread takes at once; small tensors are taken together
constexpr i64 kTensor = 256;     // what a tensor costs beyond its elements, in elements
constexpr i64 kAlone = 1 << 13;  // elements below which waking a second thread costs more than it brings

// Calls visit(stretch of memory, bytes, whether it is read, whether it is written) for every array of a parameter.
template <class Visit>
void each_array(const Work& work, const Visit& visit) {
  const i64 n = work.elements;
  if (work.kept == nullptr) {
    for (int s = 0; s < 2 + work.rule->states; ++s)
      visit(work.streams[s].at, n * storage_bytes(work.streams[s].storage), true, s != 1);
    return;
  }
  for (int o = 0; o < work.kept->count; ++o) {
    const Operand& operand = work.kept->operands[o];
    const bool copy = base_of(operand.codec) == kMasterBF16 || base_of(operand.codec) == kMasterF16;  // only written
    visit(operand.main, main_bytes(operand.codec, n), !copy, o != 1 || work.kept->zero);
    if (operand.extra != nullptr) visit(operand.extra, extra_bytes(operand.codec, n), true, true);
  }
}

}  // namespace

double Counter::read() const {
  switch (type) {
    case kFloat32: return *reinterpret_cast<const float*>(at);
    case kFloat64: return *reinterpret_cast<const double*>(at);
    case kInt32: return *reinterpret_cast<const int*>(at);
    case kInt64: return static_cast<double>(*reinterpret_cast<const i64*>(at));
    default: return 0;
  }
}

void Counter::increment() const {
  switch (type) {
    case kFloat32: *reinterpret_cast<float*>(at) += 1; break;
    case kFloat64: *reinterpret_cast<double*>(at) += 1; break;
    case kInt32: *reinterpret_cast<int*>(at) += 1; break;
    case kInt64: *reinterpret_cast<i64*>(at) += 1; break;
    default: break;
  }
}

bool share_memory(const std::vector<const Work*>& works) {
  std::vector<std::pair<const char*, const char*>> spans;
  for (const Work* work : works) {
    each_array(*work, [&](const char* at, i64 bytes, bool, bool written) {
      if (written && bytes != 0) spans.emplace_back(at, at + bytes);
    });
    if (work->counter.type != Counter::kNone) spans.emplace_back(work->counter.at, work->counter.at + sizeof(float));
  }
  std::sort(spans.begin(), spans.end());
  const char* reached = nullptr;
  for (const auto& [begin, end] : spans) {
    if (begin < reached) return true;
    reached = std::max(reached, end);
  }
  return false;
}

void Division::clear() {
  units_.clear();
  starts_.assign(1, 0);
  parameters = elements = bytes_read = bytes_written = taken_ = 0;
}

void Division::add(const Work& work) {
  ++parameters;
  elements += work.elements;
  each_array(work, [&](const char*, i64 bytes, bool read, bool written) {
    bytes_read += read ? bytes : 0;
    bytes_written += written ? bytes : 0;
  });
  i64 begin = 0;
  do {  // an empty tensor is one unit: its step count still advances
    const i64 end = std::min(begin + kChunk, work.elements);
    units_.push_back({&work, begin, end});
    taken_ += end - begin + kTensor;
    begin = end;
    if (taken_ >= kBatch) close();
  } while (begin < work.elements);
}

void Division::close() {
  taken_ = 0;
  if (starts_.back() != static_cast<i64>(units_.size())) starts_.push_back(static_cast<i64>(units_.size()));
}

// Each thread begins with a stretch of its own, which suits the memory, and then helps where work is left.
void Division::walk(const double* rows, i64 width, int threads) const {
  struct alignas(64) Stretch {
    std::atomic<i64> next{0};
    i64 end = 0;
  };
  struct Job {
    const Division& division;
    const double* rows;
    i64 width;
    std::vector<Stretch> stretches;
    std::atomic<size_t> joined{0};
  };
  const i64 useful = elements < kAlone ? 1 : std::max<i64>(batches(), 1);
  const int count = static_cast<int>(std::min<i64>(std::max(threads, 1), useful));
  Job job{*this, rows, width, std::vector<Stretch>(static_cast<size_t>(count))};
  for (int t = 0; t < count; ++t) {
    job.stretches[static_cast<size_t>(t)].next = batches() * t / count;
    job.stretches[static_cast<size_t>(t)].end = batches() * (t + 1) / count;
  }
  const auto body = [](void* context) {
    Job& job = *static_cast<Job*>(context);
    const Division& division = job.division;
    const FloatingPointMode mode;
    const size_t own = job.joined.fetch_add(1);
    for (size_t s = 0; s < job.stretches.size(); ++s) {
      Stretch& stretch = job.stretches[(own + s) % job.stretches.size()];
      for (i64 batch; (batch = stretch.next.fetch_add(1, std::memory_order_relaxed)) < stretch.end;) {
        for (i64 u = division.starts_[batch]; u < division.starts_[batch + 1]; ++u) {
          const Unit& unit = division.units_[u];
          const Work& work = *unit.work;
          const double* row = job.rows + work.row * job.width;
          if (unit.begin < unit.end && work.kept == nullptr)
            work.kernel(work.streams, unit.begin, unit.end, row);
          else if (unit.begin < unit.end)
            work.kept_kernel(*work.rule, *work.kept, unit.begin, unit.end, row);
          if (unit.begin == 0) work.counter.increment();
        }
      }
    }
  };
  run_on_threads(count, body, &job);
}

}  // namespace fasttrain
