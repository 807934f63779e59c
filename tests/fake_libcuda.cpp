// A CUDA driver for tests: it records every call, checks the order of calls as the real one would, and hands a launch
// to a callback of the test, to which host memory stands for device memory.
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

enum { kSuccess = 0, kInvalidValue = 1, kNotInitialized = 3, kInvalidDevice = 101, kInvalidContext = 201, kNotFound = 500 };
constexpr int kDevices = 2;

using Launch = int (*)(const char* kernel, unsigned blocks, unsigned threads, unsigned long long stream,
                       unsigned long long table, long long chunks, unsigned long long rows,
                       unsigned long long gradients);

struct State {
  std::string log;
  std::map<std::string, int> failures;  // function -> the error that it returns
  Launch launch = nullptr;
  int version = 13000, major = 9, minor = 0;
  bool initialized = false;
  std::vector<void*> contexts;  // the stack of current contexts
  int retained[kDevices] = {};
  std::map<std::string, std::string> functions;
} state;

int module_tag;

int enter(const char* function, const std::string& detail = "") {
  state.log += function + ("(" + detail) + ")\n";
  const auto failure = state.failures.find(function);
  if (failure != state.failures.end()) return failure->second;
  return state.initialized || std::strcmp(function, "cuInit") == 0 ? kSuccess : kNotInitialized;
}

bool current() { return !state.contexts.empty() && state.contexts.back() != nullptr; }

}  // namespace

extern "C" {

// --- For the test -----------------------------------------------------------------------------------------------------
void fake_reset() { state = State(); }
const char* fake_log() { return state.log.c_str(); }
void fake_fail(const char* function, int error) { state.failures[function] = error; }
void fake_set(Launch launch, int version, int major, int minor) {
  state.launch = launch;
  state.version = version;
  state.major = major;
  state.minor = minor;
}
int fake_current_contexts() { return static_cast<int>(state.contexts.size()); }

// --- The driver ---------------------------------------------------------------------------------------------------------
int cuInit(unsigned flags) {
  if (int error = enter("cuInit")) return error;
  state.initialized = true;
  return flags == 0 ? kSuccess : kInvalidValue;
}

int cuDriverGetVersion(int* version) {
  *version = state.version;
  return kSuccess;
}

int cuGetErrorName(int error, const char** text) {
  *text = error == kInvalidDevice ? "CUDA_ERROR_INVALID_DEVICE"
          : error == kInvalidContext ? "CUDA_ERROR_INVALID_CONTEXT"
          : error == 2               ? "CUDA_ERROR_OUT_OF_MEMORY"
          : error == 209             ? "CUDA_ERROR_NO_BINARY_FOR_GPU"
          : error == 222             ? "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"
          : error == kNotFound       ? "CUDA_ERROR_NOT_FOUND"
                                     : nullptr;
  return *text ? kSuccess : kInvalidValue;
}

int cuGetErrorString(int error, const char** text) {
  *text = error == 209   ? "no kernel image is available for execution on the device"
          : error == 222 ? "the provided PTX was compiled with an unsupported toolchain."
          : error == 999 ? nullptr
                         : "text of the driver";
  return *text ? kSuccess : kInvalidValue;
}

int cuDeviceGet(int* device, int ordinal) {
  if (int error = enter("cuDeviceGet", std::to_string(ordinal))) return error;
  *device = 100 + ordinal;  // a CUdevice need not be its ordinal
  return ordinal >= 0 && ordinal < kDevices ? kSuccess : kInvalidDevice;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (int error = enter("cuDeviceGetAttribute", std::to_string(attribute))) return error;
  *value = attribute == 16 ? 4 : attribute == 75 ? state.major : attribute == 76 ? state.minor : -1;
  return device >= 100 && *value >= 0 ? kSuccess : kInvalidValue;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  if (int error = enter("cuDevicePrimaryCtxRetain", std::to_string(device))) return error;
  *context = &state.retained[device - 100];
  return kSuccess;
}

int cuCtxPushCurrent_v2(void* context) {
  if (int error = enter("cuCtxPushCurrent")) return error;
  state.contexts.push_back(context);
  return kSuccess;
}

int cuCtxPopCurrent_v2(void** context) {
  if (int error = enter("cuCtxPopCurrent")) return error;
  if (!current()) return kInvalidContext;
  *context = state.contexts.back();
  state.contexts.pop_back();
  return kSuccess;
}

int cuModuleLoadData(void** module, const void* image) {
  if (int error = enter("cuModuleLoadData", static_cast<const char*>(image))) return error;
  *module = &module_tag;
  return current() ? kSuccess : kInvalidContext;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (int error = enter("cuModuleGetFunction", name)) return error;
  if (!current()) return kInvalidContext;
  bool known = false;
  for (const char* one : {"tree", "prologue", "keyed", "chunks_left", "count"}) known = known || std::strcmp(name, one) == 0;
  for (const char* kind : {"step_", "kept_", "squares_", "stage_", "factored_"})
    known = known || std::strncmp(name, kind, std::strlen(kind)) == 0;
  if (module != &module_tag || !known) return kNotFound;
  *function = &state.functions.emplace(name, name).first->second;
  return kSuccess;
}

int cuFuncGetAttribute(int* value, int attribute, void*) {
  if (int error = enter("cuFuncGetAttribute", std::to_string(attribute))) return error;
  *value = attribute == 4 ? 40 : attribute == 3 ? 0 : -1;
  return *value >= 0 ? kSuccess : kInvalidValue;
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int threads, size_t shared_bytes) {
  if (int error = enter("cuOccupancyMaxActiveBlocksPerMultiprocessor", std::to_string(threads))) return error;
  *blocks = 2048 / threads;
  return shared_bytes == 0 ? kSuccess : kInvalidValue;
}

int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared_bytes, void* stream, void** arguments, void** extra) {
  const std::string& name = *static_cast<std::string*>(function);
  if (int error = enter("cuLaunchKernel", name + " " + std::to_string(grid_x) + " " + std::to_string(block_x) + " " +
                                              std::to_string(reinterpret_cast<unsigned long long>(stream))))
    return error;
  if (!current()) return kInvalidContext;
  if (grid_x == 0 || grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || shared_bytes != 0 || extra != nullptr)
    return kInvalidValue;
  if (state.launch == nullptr) return kSuccess;
  return state.launch(name.c_str(), grid_x, block_x, reinterpret_cast<unsigned long long>(stream),
                      *static_cast<unsigned long long*>(arguments[0]), *static_cast<long long*>(arguments[1]),
                      *static_cast<unsigned long long*>(arguments[2]), *static_cast<unsigned long long*>(arguments[3]));
}

}  // extern "C"
