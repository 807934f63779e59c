// The CUDA driver, found at run time: nothing of CUDA is linked, so this builds and imports where there is none.
#pragma once
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "common.h"

namespace fasttrain {

struct DriverApi;  // the driver's functions; driver.cpp

class Driver {
 public:
  explicit Driver(const std::string& library);  // throws std::runtime_error with the loader's or the driver's text
  ~Driver();

  int version() const;  // 1000 * major + 10 * minor of the newest CUDA that it knows
  std::pair<int, int> capability(int device) const;
  int multiprocessors(int device) const;

  const DriverApi& api() const { return *api_; }

 private:
  int attribute(int attribute, int device) const;
  std::unique_ptr<DriverApi> api_;
};

// Device code, loaded in the primary context of one device (which is torch's). Never unloaded: when a process ends the
// driver may be gone before its modules.
class DeviceCode {
 public:
  DeviceCode(std::shared_ptr<Driver> driver, const std::string& image, int device);

  struct Usage { int registers, local_bytes, blocks; };  // blocks: how many run on one multiprocessor at a time
  Usage usage(const std::string& kernel, int threads);

  // Starts kernel(table, chunks, rows, gradients) on `stream`; all but `chunks` are addresses in device memory, and
  // `gradients` may be zero.
  void launch(const std::string& kernel, u32 blocks, u32 threads, u64 stream, u64 table, i64 chunks, u64 rows,
              u64 gradients);

 private:
  void* function(const std::string& kernel);

  std::shared_ptr<Driver> driver_;
  void* context_ = nullptr;
  void* module_ = nullptr;
  std::mutex mutex_;
  std::unordered_map<std::string, void*> functions_;
};

}  // namespace fasttrain
