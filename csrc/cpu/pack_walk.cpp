#include <algorithm>
#include <atomic>

#include "cpu/chosen.h"
#include "cpu/lanes.h"
#include "cpu/norm.h"
#include "cpu/pack.h"
#include "cpu/share.h"

namespace fasttrain {
namespace {

constexpr i64 kChunk = 1 << 15;  // elements of one piece of work
constexpr i64 kAlone = 1 << 15;  // elements below which waking a second thread costs more than it brings

}  // namespace

void move_all(const std::vector<Move>& moves, int threads) {
  const PackKernels& kernels = FT_CHOSEN(pack);
  i64 elements = 0;
  for (const Move& move : moves) elements += move.elements;
  if (elements <= kAlone || threads <= 1) {
    const FloatingPointMode mode;
    for (const Move& move : moves) kernels.move(move, 0, move.elements);
    return;
  }
  std::vector<i64> first{0};  // chunk of each move
  for (const Move& move : moves) first.push_back(first.back() + (move.elements + kChunk - 1) / kChunk);
  // Small moves are taken together: a batch is a stretch of chunks.
  std::vector<i64> batches{0};
  for (i64 taken = 0, m = 0; m < static_cast<i64>(moves.size()); ++m) {
    for (i64 begin = 0, c = first[m]; c < first[m + 1]; ++c, begin += kChunk) {
      taken += std::min(kChunk, moves[m].elements - begin);
      if (taken >= kChunk / 2) {
        batches.push_back(c + 1);
        taken = 0;
      }
    }
  }
  if (batches.back() != first.back()) batches.push_back(first.back());
  share(static_cast<i64>(batches.size()) - 1, threads, [&](i64 batch) {
    const i64 at = batches[batch], past = batches[batch + 1];
    auto m = std::upper_bound(first.begin(), first.end(), at) - first.begin() - 1;
    for (i64 c = at; c < past; ++c) {
      while (first[m + 1] <= c) ++m;
      const i64 begin = (c - first[m]) * kChunk;
      kernels.move(moves[m], begin, std::min(begin + kChunk, moves[m].elements));
    }
  });
}

bool sum_chunks(const Sum& sum, double* squares, int threads) {
  const PackKernels& kernels = FT_CHOSEN(pack);
  const SquaresKernel squares_kernel = FT_CHOSEN(squares);
  const i64 count = (sum.elements + kSumChunk - 1) / kSumChunk;
  std::vector<double> partial(static_cast<size_t>(count));
  std::atomic<bool> nonfinite{false};
  share(count, sum.elements <= kAlone ? 1 : threads, [&](i64 c) {
    const i64 begin = c * kSumChunk, end = std::min(begin + kSumChunk, sum.elements);
    // A stretch that the nearest cache keeps is added and then squared, so that memory is walked once.
    kernels.sum(sum, begin, end);
    if (squares == nullptr) return;
    bool found = false;
    partial[static_cast<size_t>(c)] = squares_kernel({sum.to.main, sum.to.codec}, begin, end, &found);
    if (found) nonfinite = true;
  });
  const FloatingPointMode mode;
  if (squares != nullptr) *squares = tree(partial.data(), count);
  return nonfinite;
}

}  // namespace fasttrain
