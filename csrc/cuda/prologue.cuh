// The prologue of a captured step: rows of coefficients, computed on the device from its step counts. A thread makes a
// row. Its numbers are described by three words each: the address of a number on the device or 0, the type of what lies
// there, and a double, to which that is added. fasttrain/kernels/prologue.py writes the words.
#pragma once
#include "cuda/coefficients.cuh"

namespace fasttrain {
inline namespace FT_ISA {

// Before the inputs of the rule's coefficients: `FIXED` in prologue.py.
enum Fixed { kFound, kScale, kGradScale, kNorm, kMaxNorm, kSquare, kMaxEach, kClipValue, kEmaDecay, kFixed };

// What may lie at an address: `KINDS` in prologue.py.
enum Kind : i64 { kFloat, kDouble, kInt, kLong, kBool };

struct Numbers {
  const i64* words;

  HOST_DEVICE double operator[](int place) const {
    const i64 address = words[3 * place], kind = words[3 * place + 1];
    const double value = bit_cast<double>(words[3 * place + 2]);
    if (address == 0) return value;
    switch (kind) {
      case kFloat: return value + static_cast<double>(*reinterpret_cast<const float*>(address));
      case kDouble: return value + *reinterpret_cast<const double*>(address);
      case kInt: return value + static_cast<double>(*reinterpret_cast<const int*>(address));
      case kLong: return value + static_cast<double>(*reinterpret_cast<const i64*>(address));
      default: return value + static_cast<double>(*reinterpret_cast<const u8*>(address));
    }
  }
};

// `coefficient` in fasttrain/optim/clip.py.
HOST_DEVICE double clip_coefficient(double norm, double largest) {
  const double scale = largest / (norm + 1e-6);
  return scale >= 1.0 ? 1.0 : scale;  // NaN stays NaN
}

template <class Coefficients, class T>
struct Prologue {
  static constexpr int numbers = kFixed + Coefficients::inputs, width = 1 + Coefficients::coefficients;

  HOST_DEVICE static void one(const Numbers& fixed, T* out, int* skip, bool kept) {
    *skip = fixed[kFound] != 0.0;
    double scale = clip_coefficient(fixed[kNorm], fixed[kMaxNorm]) / fixed[kGradScale];
    scale = scale * clip_coefficient(absolute(scale) * square_root(fixed[kSquare]), fixed[kMaxEach]);
    out[0] = static_cast<T>(scale * fixed[kScale]);
    Coefficients::row(Numbers{fixed.words + 3 * kFixed}, out + 1);
    if (kept) {
      const double keep = fixed[kEmaDecay];
      out[width] = static_cast<T>(fixed[kClipValue]);
      out[width + 1] = static_cast<T>(keep);
      out[width + 2] = static_cast<T>(1.0 - keep);
    }
  }

  // The rows `first`, `first + step`, ... of one thread. `kept`: a row ends with the numbers of `Tail`
  // (fasttrain/kernels/item.py).
  HOST_DEVICE static void walk(const i64* words, i64 rows, T* out, int* skip, bool kept, i64 first, i64 step) {
    const i64 columns = width + (kept ? 3 : 0);
    for (i64 row = first; row < rows; row += step)
      one(Numbers{words + row * 3 * numbers}, out + row * columns, skip + row, kept);
  }
};

}  // namespace FT_ISA
}  // namespace fasttrain
