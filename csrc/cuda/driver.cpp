#include "cuda/driver.h"

#include <dlfcn.h>

#include <stdexcept>

namespace fasttrain {

// Names and values as in NVIDIA's cuda.h. Handles are pointers, a CUdevice and every enumeration is an int.
struct DriverApi {
  int (*cuInit)(unsigned flags);
  int (*cuDriverGetVersion)(int* version);
  int (*cuGetErrorName)(int error, const char** text);
  int (*cuGetErrorString)(int error, const char** text);
  int (*cuDeviceGet)(int* device, int ordinal);
  int (*cuDeviceGetAttribute)(int* value, int attribute, int device);
  int (*cuDevicePrimaryCtxRetain)(void** context, int device);
  int (*cuCtxPushCurrent_v2)(void* context);
  int (*cuCtxPopCurrent_v2)(void** context);
  int (*cuModuleLoadData)(void** module, const void* image);
  int (*cuModuleGetFunction)(void** function, void* module, const char* name);
  int (*cuFuncGetAttribute)(int* value, int attribute, void* function);
  int (*cuOccupancyMaxActiveBlocksPerMultiprocessor)(int* blocks, void* function, int threads, size_t shared_bytes);
  int (*cuLaunchKernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** arguments,
                        void** extra);

  void check(int error, const std::string& call) const {
    if (error == 0) return;
    const char *name = nullptr, *text = nullptr;
    cuGetErrorName(error, &name);
    cuGetErrorString(error, &text);
    throw std::runtime_error(call + ": " + (name ? name : "error " + std::to_string(error)) + (text ? ", " : "") +
                             (text ? text : ""));
  }
};

namespace {

enum DeviceAttribute { kMultiprocessors = 16, kCapabilityMajor = 75, kCapabilityMinor = 76 };
enum FunctionAttribute { kLocalBytes = 3, kRegisters = 4 };

template <class F>
void find(void* library, const std::string& path, const char* name, F*& function) {
  function = reinterpret_cast<F*>(dlsym(library, name));
  if (function == nullptr) throw std::runtime_error(path + " has no " + name + ": it is not a CUDA driver, or too old");
}

// The context is current while this lives, whatever torch or the caller had made current.
class Current {
 public:
  Current(const DriverApi& api, void* context) : api_(api) { api.check(api.cuCtxPushCurrent_v2(context), "cuCtxPushCurrent"); }
  ~Current() {
    void* context;
    api_.cuCtxPopCurrent_v2(&context);
  }
  Current(const Current&) = delete;

 private:
  const DriverApi& api_;
};

}  // namespace

Driver::Driver(const std::string& path) : api_(std::make_unique<DriverApi>()) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);  // never closed: torch uses it too
  if (library == nullptr) throw std::runtime_error(dlerror());
#define FT_FIND(name) find(library, path, #name, api_->name)
  FT_FIND(cuInit);
  FT_FIND(cuDriverGetVersion);
  FT_FIND(cuGetErrorName);
  FT_FIND(cuGetErrorString);
  FT_FIND(cuDeviceGet);
  FT_FIND(cuDeviceGetAttribute);
  FT_FIND(cuDevicePrimaryCtxRetain);
  FT_FIND(cuCtxPushCurrent_v2);
  FT_FIND(cuCtxPopCurrent_v2);
  FT_FIND(cuModuleLoadData);
  FT_FIND(cuModuleGetFunction);
  FT_FIND(cuFuncGetAttribute);
  FT_FIND(cuOccupancyMaxActiveBlocksPerMultiprocessor);
  FT_FIND(cuLaunchKernel);
#undef FT_FIND
  api_->check(api_->cuInit(0), "cuInit");
}

Driver::~Driver() = default;

int Driver::version() const {
  int version = 0;
  api_->check(api_->cuDriverGetVersion(&version), "cuDriverGetVersion");
  return version;
}

int Driver::attribute(int attribute, int ordinal) const {
  int device = 0, value = 0;
  api_->check(api_->cuDeviceGet(&device, ordinal), "cuDeviceGet(" + std::to_string(ordinal) + ")");
  api_->check(api_->cuDeviceGetAttribute(&value, attribute, device), "cuDeviceGetAttribute");
  return value;
}

std::pair<int, int> Driver::capability(int device) const {
  return {attribute(kCapabilityMajor, device), attribute(kCapabilityMinor, device)};
}

int Driver::multiprocessors(int device) const { return attribute(kMultiprocessors, device); }

DeviceCode::DeviceCode(std::shared_ptr<Driver> driver, const std::string& image, int ordinal) : driver_(std::move(driver)) {
  const DriverApi& api = driver_->api();
  int device = 0;
  api.check(api.cuDeviceGet(&device, ordinal), "cuDeviceGet(" + std::to_string(ordinal) + ")");
  api.check(api.cuDevicePrimaryCtxRetain(&context_, device), "cuDevicePrimaryCtxRetain");
  const Current current(api, context_);
  api.check(api.cuModuleLoadData(&module_, image.data()), "cuModuleLoadData");
}

void* DeviceCode::function(const std::string& kernel) {
  const std::lock_guard<std::mutex> lock(mutex_);
  void*& found = functions_[kernel];
  if (found == nullptr) {
    const DriverApi& api = driver_->api();
    api.check(api.cuModuleGetFunction(&found, module_, kernel.c_str()), "cuModuleGetFunction(" + kernel + ")");
  }
  return found;
}

DeviceCode::Usage DeviceCode::usage(const std::string& kernel, int threads) {
  const DriverApi& api = driver_->api();
  const Current current(api, context_);
  void* loaded = function(kernel);
  Usage usage{};
  api.check(api.cuFuncGetAttribute(&usage.registers, kRegisters, loaded), "cuFuncGetAttribute");
  api.check(api.cuFuncGetAttribute(&usage.local_bytes, kLocalBytes, loaded), "cuFuncGetAttribute");
  api.check(api.cuOccupancyMaxActiveBlocksPerMultiprocessor(&usage.blocks, loaded, threads, 0),
            "cuOccupancyMaxActiveBlocksPerMultiprocessor");
  return usage;
}

void DeviceCode::launch(const std::string& kernel, u32 blocks, u32 threads, u64 stream, u64 table, i64 chunks, u64 rows,
                        u64 gradients) {
  const DriverApi& api = driver_->api();
  const Current current(api, context_);
  void* arguments[] = {&table, &chunks, &rows, &gradients};  // a kernel takes as many as it declares
  api.check(api.cuLaunchKernel(function(kernel), blocks, 1, 1, threads, 1, 1, 0, reinterpret_cast<void*>(stream),
                               arguments, nullptr),
            "cuLaunchKernel(" + kernel + ")");
}

}  // namespace fasttrain
