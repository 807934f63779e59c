// Cross-entropy of a row of logits and the index of its class: each pass over the logits is one function of a row.
//
// A row is measured in blocks of 1,024 elements from its start: each block's maximum, then the sum of exp(x - maximum),
// both while the block is in the L1 cache. In a block, element i is added in fp32 to lane i % 32, in order, and the lanes
// in double, one half to the other until one is left; blocks are then brought to the row's maximum and added in order, in double. So the
// bits do not depend on the instruction set, nor on threads, which share out whole rows.
#pragma once
#include "step.h"

namespace fasttrain {

constexpr i64 kEntropyBlock = 1024;

// What is known of a block or of a row: the largest logit, the sum of exp(x - max), and the sum of x - max (of x, if the
// largest is -inf).
struct RowSums {
  float max;
  double sum, shifted;
};

struct EntropyKernels {
  // One pass over a row. `blocks`: scratch, one for each block of the row. Without `smooth`, `shifted` is 0.
  RowSums (*measure)(const char* row, u8 storage, i64 columns, bool smooth, RowSums* blocks);
  // to[i] = scale * exp(row[i] - max) - offset, rounded once to the storage; `to` may be the row.
  void (*gradient)(const char* row, u8 storage, i64 columns, char* to, float max, float scale, float offset);
};

// Defined in cpu/cross_entropy.cpp, once per instruction set.
#if defined(FT_X86)
namespace baseline { extern const EntropyKernels entropy; }
namespace avx2 { extern const EntropyKernels entropy; }
namespace avx512 { extern const EntropyKernels entropy; }
#else
namespace portable { extern const EntropyKernels entropy; }
#endif

// Rows of `columns` logits that lie one after the other, in groups: row i begins at i / rows * outer + i % rows * inner.
struct LogitRows {
  char* at = nullptr;
  u8 storage = kF32;
  i64 groups = 0, rows = 0, columns = 0, outer = 0, inner = 0;  // strides in elements
  i64 count() const { return groups * rows; }
  char* row(i64 i) const { return at + (i / rows * outer + i % rows * inner) * storage_bytes(storage); }
};

// Indices of classes, one for each row.
struct Targets {
  const char* at = nullptr;
  int bytes = 8;  // 8 or 4, signed; or 1, unsigned
  i64 of(i64 row) const;
};

struct EntropyTerms {
  i64 first, vocabulary;  // the class of the first column; the number of classes
  i64 ignored;            // the target of rows that count for nothing
  double smoothing, z;
};

struct EntropyTotals {
  i64 wrong_row = -1;  // the first whose target is no class; nothing else is then of use
  i64 count = 0, correct = 0;
  double loss = 0.0, z = 0.0;
};

constexpr int kParts = 5;  // a row's max, sum, the target's logit (NaN if it lies elsewhere), shifted, number of columns

// parts[row] for every row; if `losses` is not null all classes are here, and it gets each row's loss without its z term,
// and `z` that term.
EntropyTotals measure_rows(const LogitRows& logits, const Targets& targets, const EntropyTerms& terms, float* parts,
                           float* losses, float* z, int threads);

// The derivative by the logits of the sum of scales[row] * loss[row] (or scales[0], if `one_scale`), given each row's
// max and sum over all classes.
void differentiate_rows(const LogitRows& logits, const Targets& targets, const EntropyTerms& terms, const float* parts,
                        const float* scales, bool one_scale, const LogitRows& to, int threads);

}  // namespace fasttrain
