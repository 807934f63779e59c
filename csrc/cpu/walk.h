// The CPU walk: one flat parallel loop over the chunks of all tensors.
#pragma once
#include <vector>

#include "cpu/kept.h"
#include "step.h"

namespace fasttrain {

// A step count in CPU memory, incremented by the walk.
struct Counter {
  enum Type { kNone, kFloat32, kFloat64, kInt32, kInt64 } type = kNone;
  char* at = nullptr;

  double read() const;
  void increment() const;
};

// One parameter to be stepped.
struct Work {
  Stream streams[kMaxStreams] = {};
  const Kept* kept = nullptr;  // what it is if it is not plain; then `streams` is not used
  const RuleKernels* rule = nullptr;
  StepKernel kernel = nullptr;
  KeptKernels::Step kept_kernel = nullptr;
  i64 elements = 0;
  int row = 0;  // of the table of coefficients
  Counter counter;
};

// Whether two tensors that are written share memory. Such parameters must be stepped in their order, by one thread.
bool share_memory(const std::vector<const Work*>& works);

// All work of a step, cut into units (at most one chunk of one tensor) and batches of units that a thread takes at once.
class Division {
 public:
  void clear();
  void add(const Work& work);  // keeps the address
  void close();

  // Does the work; `rows` has `width` doubles for each row. The interpreter lock is not needed.
  void walk(const double* rows, i64 width, int threads) const;

  i64 parameters = 0, elements = 0, bytes_read = 0, bytes_written = 0;  // step counts excepted
  i64 batches() const { return static_cast<i64>(starts_.size()) - 1; }

 private:
  struct Unit {
    const Work* work;
    i64 begin, end;
  };
  std::vector<Unit> units_;
  std::vector<i64> starts_{0};  // first unit of each batch, and one past the last unit
  i64 taken_ = 0;
};

}  // namespace fasttrain
