// Run one function on several threads.
#pragma once

namespace fasttrain {

// Calls `body(context)` once on each of up to `threads` threads, the caller among them, and returns when all are
// done. The body takes its share of the work from a shared counter: fewer threads than asked for are fine.
void run_on_threads(int threads, void (*body)(void*), void* context);

// "gomp: PATH" where torch's own OpenMP threads are used, else "pool".
const char* threading();

// The floating-point mode of the calling thread: round to nearest, denormals kept, no traps; restored on destruction.
class FloatingPointMode {
 public:
  FloatingPointMode();
  ~FloatingPointMode();
  FloatingPointMode(const FloatingPointMode&) = delete;
  FloatingPointMode& operator=(const FloatingPointMode&) = delete;

 private:
  unsigned long long saved_;
};

}  // namespace fasttrain
