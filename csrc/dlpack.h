// The parts of the DLPack 1.x C ABI that describe a tensor without owning it, and the table of functions that a
// framework publishes as `Tensor.__dlpack_c_exchange_api__` (https://dmlc.github.io/dlpack/latest/c_api.html).
// With it a tensor's pointer and metadata are read in tens of nanoseconds and without a header of torch.
#pragma once
#include <cstdint>

namespace fasttrain::dlpack {

constexpr std::uint32_t kMajor = 1;
enum DeviceType : std::int32_t { kCPU = 1, kCUDA = 2 };
enum TypeCode : std::uint8_t {
  kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kFloat8E4M3 = 10, kFloat8E5M2 = 12
};

struct Device {
  std::int32_t type;
  std::int32_t index;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct ExchangeApi {
  std::uint32_t major, minor;
  ExchangeApi* previous;
  void* allocate;
  void* managed_from_object;
  void* object_from_managed;
  int (*tensor_from_object)(void* object, Tensor* out);  // borrows; 0, or -1 with a Python error set
  int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** out);
};

}  // namespace fasttrain::dlpack
