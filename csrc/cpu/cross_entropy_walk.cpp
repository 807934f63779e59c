#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "codecs.h"
#include "cpu/chosen.h"
#include "cpu/cross_entropy.h"
#include "cpu/share.h"

namespace fasttrain {
namespace {

constexpr i64 kBatch = 1 << 14;  // elements that a thread takes at once, at least
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Calls `each(row)` for every row, by all threads.
template <class Each>
void each_row(i64 rows, i64 columns, int threads, const Each& each) {
  const i64 together = std::max<i64>(kBatch / std::max<i64>(columns, 1), 1);
  share((rows + together - 1) / together, threads, [&](i64 batch) {
    for (i64 row = batch * together; row < std::min(rows, (batch + 1) * together); ++row) each(row);
  });
}

}  // namespace

i64 Targets::of(i64 row) const {
  if (bytes == 1) return static_cast<u8>(at[row]);
  if (bytes == 4) {
    int found;
    std::memcpy(&found, at + 4 * row, 4);
    return found;
  }
  i64 found;
  std::memcpy(&found, at + 8 * row, 8);
  return found;
}

EntropyTotals measure_rows(const LogitRows& logits, const Targets& targets, const EntropyTerms& terms, float* parts,
                           float* losses, float* z, int threads) {
  EntropyTotals totals;
  const i64 rows = logits.count(), columns = logits.columns;
  for (i64 row = 0; row < rows; ++row) {
    const i64 target = targets.of(row);
    if (target == terms.ignored) continue;
    ++totals.count;
    if (target >= 0 && target < terms.vocabulary) continue;
    totals.wrong_row = row;
    return totals;
  }
  const EntropyKernels& kernels = FT_CHOSEN(entropy);
  const bool smooth = terms.smoothing != 0.0;
  std::atomic<i64> correct{0};
  each_row(rows, columns, threads, [&](i64 row) {
    // One vector for each thread, grown once: rows are many.
    thread_local std::vector<RowSums> blocks;
    blocks.resize(static_cast<size_t>((columns + kEntropyBlock - 1) / kEntropyBlock));
    float* part = parts + row * kParts;
    const i64 target = targets.of(row), here = target - terms.first;
    if (target == terms.ignored) {
      part[0] = part[2] = part[3] = part[4] = 0.0f;
      part[1] = 1.0f;
      if (losses != nullptr) losses[row] = z[row] = 0.0f;
      return;
    }
    const RowSums sums = kernels.measure(logits.row(row), logits.storage, columns, smooth, blocks.data());
    const double logit = here >= 0 && here < columns ? load_element<double>(logits.row(row), logits.storage, here) : kNaN;
    part[0] = sums.max;
    part[1] = static_cast<float>(sums.sum);
    part[2] = static_cast<float>(logit);
    part[3] = static_cast<float>(sums.shifted);
    part[4] = static_cast<float>(columns);
    if (losses == nullptr) return;
    const double tail = std::log(sums.sum);  // of a row of -inf alone, -inf
    double loss = (1.0 - terms.smoothing) * (sums.max - logit + tail);
    if (smooth) loss += terms.smoothing * (tail - sums.shifted / static_cast<double>(columns));
    losses[row] = static_cast<float>(loss);
    z[row] = terms.z == 0.0 ? 0.0f : static_cast<float>(terms.z * (sums.max + tail) * (sums.max + tail));
    if (logit == sums.max) correct.fetch_add(1, std::memory_order_relaxed);
  });
  totals.correct = correct;
  if (losses != nullptr)
    for (i64 row = 0; row < rows; ++row) {
      totals.loss += losses[row];
      totals.z += z[row];
    }
  return totals;
}

void differentiate_rows(const LogitRows& logits, const Targets& targets, const EntropyTerms& terms, const float* parts,
                        const float* scales, bool one_scale, const LogitRows& to, int threads) {
  const EntropyKernels& kernels = FT_CHOSEN(entropy);
  const i64 columns = logits.columns;
  each_row(logits.count(), columns, threads, [&](i64 row) {
    const char* from = logits.row(row);
    char* into = to.row(row);
    const i64 target = targets.of(row), here = target - terms.first;
    if (target == terms.ignored) {
      std::memset(into, 0, static_cast<size_t>(columns * storage_bytes(to.storage)));
      return;
    }
    const double max = parts[row * kParts], sum = parts[row * kParts + 1], scale = scales[one_scale ? 0 : row];
    const double each = scale * (terms.z == 0.0 ? 1.0 : 1.0 + 2.0 * terms.z * (max + std::log(sum))) / sum;
    const double offset = terms.smoothing == 0.0 ? 0.0 : scale * terms.smoothing / static_cast<double>(terms.vocabulary);
    const bool inside = here >= 0 && here < columns;
    double own = 0.0;
    if (inside)
      own = each * std::exp(load_element<double>(from, logits.storage, here) - max) - offset -
            scale * (1.0 - terms.smoothing);
    kernels.gradient(from, logits.storage, columns, into, static_cast<float>(max), static_cast<float>(each),
                     static_cast<float>(offset));
    if (inside) store_element(into, to.storage, here, own);
  });
}

}  // namespace fasttrain
