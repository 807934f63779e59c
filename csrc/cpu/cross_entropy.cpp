// The passes over a row of logits: compiled once per instruction set, like step.cpp, and under the same rules.
#include "cpu/cross_entropy.h"

#include "codecs.h"
#include "cpu/exponential.h"
#include "cpu/fetch.h"

namespace fasttrain {
inline namespace FT_ISA {
namespace {

constexpr int kTogether = 32;                    // lanes of a block
constexpr int kVectors = kTogether / kWidth;     // that hold them
constexpr i64 kAhead = 2 * kEntropyBlock;        // elements between what is asked for and what is read
constexpr float kInfinity = __builtin_inff();

HOST_DEVICE Reals larger(const Reals& a, const Reals& b) { return a > b ? a : b; }  // b if a is NaN

// A block's elements in fp32: where they lie, or copied.
const float* staged(const char* row, u8 storage, i64 from, i64 n, float* __restrict buffer) {
  if (storage == kF32) return reinterpret_cast<const float*>(row) + from;
  if (storage == kBF16)
    for (i64 i = 0; i < n; ++i) buffer[i] = load_element<float>(row, kBF16, from + i);
  else
    for (i64 i = 0; i < n; ++i) buffer[i] = load_element<float>(row, kF16, from + i);
  return buffer;
}

// The largest element; NaN is passed over.
float largest(const float* x, i64 n) {
  float lanes[kTogether];
  Reals found[kVectors];
  for (int v = 0; v < kVectors; ++v) found[v] = Reals{} - kInfinity;
  const i64 whole = n / kTogether * kTogether;
  for (i64 i = 0; i < whole; i += kTogether)
    for (int v = 0; v < kVectors; ++v) found[v] = larger(load_reals(x + i + v * kWidth), found[v]);
  for (int v = 0; v < kVectors; ++v) store_reals(lanes + v * kWidth, found[v]);
  for (i64 i = whole; i < n; ++i) lanes[i - whole] = x[i] > lanes[i - whole] ? x[i] : lanes[i - whole];
  for (int half = kTogether / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lanes[j] = lanes[j + half] > lanes[j] ? lanes[j + half] : lanes[j];
  return lanes[0];
}

// What is subtracted for a maximum: exp(-inf - 0) is 0, and of NaN it is NaN.
HOST_DEVICE float finite(float max) { return max == -kInfinity ? 0.0f : max; }

HOST_DEVICE double added(const float* lanes) {
  double exact[kTogether];
  for (int j = 0; j < kTogether; ++j) exact[j] = lanes[j];
  for (int half = kTogether / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) exact[j] += exact[j + half];
  return exact[0];
}

template <bool kSmooth>
void add_block(const float* x, i64 n, RowSums* to) {
  const float max = finite(to->max);
  Reals sums[kVectors] = {}, shifts[kVectors] = {};
  const i64 whole = n / kTogether * kTogether;
  for (i64 i = 0; i < whole; i += kTogether)
    for (int v = 0; v < kVectors; ++v) {
      const Reals shifted = load_reals(x + i + v * kWidth) - max;
      sums[v] += exponential(shifted);
      if constexpr (kSmooth) shifts[v] += shifted;
    }
  float lanes[2][kTogether], tail[2][kTogether] = {};
  for (int v = 0; v < kVectors; ++v) {
    store_reals(lanes[0] + v * kWidth, sums[v]);
    store_reals(lanes[1] + v * kWidth, shifts[v]);
  }
  if (whole < n) {
    for (i64 i = whole; i < n; ++i) tail[1][i - whole] = x[i] - max;
    for (int v = 0; v < kVectors; ++v)
      store_reals(tail[0] + v * kWidth, exponential(load_reals(tail[1] + v * kWidth)));
    for (i64 i = 0; i < n - whole; ++i) {
      lanes[0][i] += tail[0][i];
      lanes[1][i] += tail[1][i];
    }
  }
  to->sum = added(lanes[0]);
  to->shifted = kSmooth ? added(lanes[1]) : 0.0;
}

RowSums measure(const char* row, u8 storage, i64 columns, bool smooth, RowSums* blocks) {
  alignas(64) float buffer[kEntropyBlock];
  const i64 size = storage_bytes(storage), count = (columns + kEntropyBlock - 1) / kEntropyBlock;
  RowSums total{-kInfinity, 0.0, 0.0};
  for (i64 b = 0; b < count; ++b) {
    const i64 from = b * kEntropyBlock, n = columns - from < kEntropyBlock ? columns - from : kEntropyBlock;
    if (from + kAhead + kEntropyBlock <= columns) fetch(row + (from + kAhead) * size, kEntropyBlock * size);
    const float* x = staged(row, storage, from, n, buffer);
    blocks[b].max = largest(x, n);
    if (smooth)
      add_block<true>(x, n, blocks + b);
    else
      add_block<false>(x, n, blocks + b);
    total.max = blocks[b].max > total.max ? blocks[b].max : total.max;
  }
  if (count == 1) {
    total.sum = blocks[0].sum;
    total.shifted = blocks[0].shifted;
    return total;
  }
  const float max = finite(total.max);
  float factors[kWidth] = {};
  for (i64 b = 0; b < count; b += kWidth) {
    const i64 n = count - b < kWidth ? count - b : kWidth;
    for (i64 i = 0; i < n; ++i) factors[i] = blocks[b + i].max - max;
    store_reals(factors, exponential(load_reals(factors)));
    for (i64 i = 0; i < n; ++i) total.sum += blocks[b + i].sum * static_cast<double>(factors[i]);
  }
  for (i64 b = 0; smooth && b < count; ++b) {
    const i64 from = b * kEntropyBlock, n = columns - from < kEntropyBlock ? columns - from : kEntropyBlock;
    total.shifted += blocks[b].shifted + static_cast<double>(n) * (static_cast<double>(finite(blocks[b].max)) - max);
  }
  return total;
}

void gradient(const char* row, u8 storage, i64 columns, char* to, float max, float scale, float offset) {
  alignas(64) float buffer[kEntropyBlock];
  alignas(64) float found[kEntropyBlock];
  const i64 size = storage_bytes(storage);
  for (i64 from = 0; from < columns; from += kEntropyBlock) {
    const i64 n = columns - from < kEntropyBlock ? columns - from : kEntropyBlock;
    if (from + kAhead + kEntropyBlock <= columns) fetch(row + (from + kAhead) * size, kEntropyBlock * size);
    const float* x = staged(row, storage, from, n, buffer);
    float* out = storage == kF32 ? reinterpret_cast<float*>(to) + from : found;
    const i64 whole = n / kWidth * kWidth;
    for (i64 i = 0; i < whole; i += kWidth)
      store_reals(out + i, exponential(load_reals(x + i) - max) * scale - offset);
    if (whole < n) {
      float tail[kWidth] = {};
      for (i64 i = whole; i < n; ++i) tail[i - whole] = x[i] - max;
      store_reals(tail, exponential(load_reals(tail)) * scale - offset);
      for (i64 i = whole; i < n; ++i) out[i] = tail[i - whole];
    }
    if (storage == kBF16)
      for (i64 i = 0; i < n; ++i) store_element(to, kBF16, from + i, found[i]);
    else if (storage == kF16)
      for (i64 i = 0; i < n; ++i) store_element(to, kF16, from + i, found[i]);
  }
}

}  // namespace
}  // namespace FT_ISA

namespace FT_ISA {
extern const EntropyKernels entropy;
const EntropyKernels entropy = {measure, gradient};
}  // namespace FT_ISA
}  // namespace fasttrain
