// Threads for the CPU walk.
//
// torch's OpenMP threads spin for a while after each of torch's operations. Threads of our own would compete with them
// for the cores, so the step runs on torch's: its OpenMP runtime is found among the loaded libraries and its
// GOMP_parallel is called, the entry point of every `#pragma omp parallel` that GCC compiles. Where there is none, and
// in a process that was forked after the runtime started (GNU OpenMP would wait for threads that fork did not copy),
// a small pool of our own serves.
#include "cpu/threads.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fasttrain {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

struct Gomp {
  GompParallel parallel = nullptr;
  std::string description = "pool";
};

int find_openmp(struct dl_phdr_info* info, size_t, void* found) {
  auto* best = static_cast<std::string*>(found);
  const char* base = std::strrchr(info->dlpi_name, '/');
  base = base ? base + 1 : info->dlpi_name;
  const bool openmp = std::strncmp(base, "libgomp", 7) == 0 || std::strncmp(base, "libomp", 6) == 0 ||
                      std::strncmp(base, "libiomp5", 8) == 0;
  const bool torchs = std::strstr(info->dlpi_name, "torch") != nullptr;
  if (openmp && (best->empty() || torchs)) *best = info->dlpi_name;
  return 0;
}

Gomp find_gomp() {
  Gomp gomp;
  const char* wanted = std::getenv("FASTTRAIN_THREADING");
  if (wanted != nullptr && std::strcmp(wanted, "pool") == 0) return gomp;
  std::string path;
  dl_iterate_phdr(find_openmp, &path);
  if (path.empty()) return gomp;
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return gomp;
  gomp.parallel = reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
  if (gomp.parallel != nullptr) gomp.description = "gomp: " + path;
  return gomp;
}

const Gomp& gomp() {
  static const Gomp found = find_gomp();
  return found;
}

// Sleeping workers, woken for one job at a time. A second caller that finds the pool busy does its work alone.
class Pool {
 public:
  void run(int threads, void (*body)(void*), void* context) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock() || threads <= 1) return body(context);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) {
        const int number = static_cast<int>(workers_.size());
        workers_.emplace_back([this, number] { work(number); });
        workers_.back().detach();
      }
      body_ = body;
      context_ = context;
      wanted_ = running_ = threads - 1;
      ++job_;
    }
    wake_.notify_all();
    body(context);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void work(int number) {
    unsigned long long seen = 0;
    for (;;) {
      void (*body)(void*);
      void* context;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return job_ != seen; });
        seen = job_;
        if (number >= wanted_) continue;
        body = body_;
        context = context_;
      }
      body(context);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  void (*body_)(void*) = nullptr;
  void* context_ = nullptr;
  int wanted_ = 0, running_ = 0;
  unsigned long long job_ = 0;
};

std::atomic<bool> forked{false};
std::atomic<Pool*> current_pool{nullptr};

void after_fork_in_child() {
  forked = true;
  current_pool = nullptr;  // its threads and locks belong to the parent: the object is abandoned
}

Pool& pool() {
  Pool* found = current_pool.load();
  if (found == nullptr) {
    Pool* fresh = new Pool;  // never destroyed: its threads may outlive static destructors
    if (current_pool.compare_exchange_strong(found, fresh)) return *fresh;
    delete fresh;
  }
  return *found;
}

const int registered = pthread_atfork(nullptr, nullptr, after_fork_in_child);

}  // namespace

void run_on_threads(int threads, void (*body)(void*), void* context) {
  if (threads <= 1) return body(context);
  if (gomp().parallel != nullptr && !forked) {
    gomp().parallel(body, context, static_cast<unsigned>(threads), 0);
  } else {
    pool().run(threads, body, context);
  }
}

const char* threading() { return forked ? "pool" : gomp().description.c_str(); }

#if defined(__x86_64__)
FloatingPointMode::FloatingPointMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
FloatingPointMode::~FloatingPointMode() { _mm_setcsr(static_cast<unsigned>(saved_)); }
#elif defined(__aarch64__)
FloatingPointMode::FloatingPointMode() {
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  asm volatile("msr fpcr, %0" : : "r"(0ull));
}
FloatingPointMode::~FloatingPointMode() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }
#else
#error "FloatingPointMode: this processor's floating-point control register is not known here"
#endif

}  // namespace fasttrain
