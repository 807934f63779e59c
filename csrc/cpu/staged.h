// Elements of any storage as an array of T: where they lie if they are kept as T, else converted into a buffer.
#pragma once
#include "codecs.h"
#include "step.h"

namespace fasttrain {
inline namespace FT_ISA {

template <class T> HOST_DEVICE constexpr u8 storage_as() { return sizeof(T) == 8 ? kF64 : kF32; }

// Elements [begin, begin + n).
template <class T>
HOST_DEVICE const T* read(const Stream& stream, i64 begin, i64 n, T* __restrict buffer) {
  const void* from = stream.at;
  if (stream.storage == storage_as<T>()) return static_cast<const T*>(from) + begin;
  switch (stream.storage) {  // one loop per storage, so that each vectorises
    case kF32: for (i64 i = 0; i < n; ++i) buffer[i] = load_element<T>(from, kF32, begin + i); break;
    case kF64: for (i64 i = 0; i < n; ++i) buffer[i] = load_element<T>(from, kF64, begin + i); break;
    case kBF16: for (i64 i = 0; i < n; ++i) buffer[i] = load_element<T>(from, kBF16, begin + i); break;
    default: for (i64 i = 0; i < n; ++i) buffer[i] = load_element<T>(from, kF16, begin + i); break;
  }
  return buffer;
}

// Where to write elements that `write` stores: in place, or in the buffer.
template <class T>
HOST_DEVICE T* place(const Stream& stream, i64 begin, T* buffer) {
  return stream.storage == storage_as<T>() ? reinterpret_cast<T*>(stream.at) + begin : buffer;
}

template <class T>
HOST_DEVICE void write(const Stream& stream, i64 begin, i64 n, const T* __restrict from) {
  void* to = stream.at;
  if (stream.storage == storage_as<T>()) return;  // it lies there
  switch (stream.storage) {
    case kF32: for (i64 i = 0; i < n; ++i) store_element(to, kF32, begin + i, from[i]); break;
    case kF64: for (i64 i = 0; i < n; ++i) store_element(to, kF64, begin + i, from[i]); break;
    case kBF16: for (i64 i = 0; i < n; ++i) store_element(to, kBF16, begin + i, from[i]); break;
    default: for (i64 i = 0; i < n; ++i) store_element(to, kF16, begin + i, from[i]); break;
  }
}

}  // namespace FT_ISA
}  // namespace fasttrain
