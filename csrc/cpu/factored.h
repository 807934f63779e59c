// Steps with a factored second moment (Adafactor): row and column means of the squared gradient, the root mean square of
// the update, and the update. Three passes: g and p, then g, then g and p again, which is written: 24 bytes an element
// in fp32, of which only the first 8 come from memory where a parameter fits the cache.
#pragma once
#include <vector>

#include "cpu/walk.h"

namespace fasttrain {

// Rows [0, rows) of `columns` elements each, `stride` elements apart, the first of them element `at` of a tensor.
struct Tile {
  i64 at, rows, columns, stride;
};

// The update is scale * g / sqrt(max(row factor * column factor, least)).
struct FactoredScalars {
  double scale, least, keep, rate;
};

struct FactoredKernels {
  // Adds each row's sum of squares of g to rows[i * row_step], and each column's to columns[j].
  void (*sums)(const Stream& g, const Tile& tile, double* rows, i64 row_step, double* columns);
  // The sum of squares of the update. Factors are of the type that the kernel computes in.
  double (*update_squares)(const Stream& g, const Tile& tile, const void* rows, const void* columns,
                           const FactoredScalars& k);
  // p = keep * p - rate * update.
  void (*apply)(const Stream& p, const Stream& g, const Tile& tile, const void* rows, const void* columns,
                const FactoredScalars& k);
  // Where the second moment is kept whole: v + weight * ((scale * g)^2 - v), as the kernel's type; stored in v or not.
  void (*moment)(const Stream& v, const Stream& g, i64 begin, i64 n, double scale, double weight, void* to, bool store);
};

struct FactoredIsa {
  FactoredKernels narrow, wide;  // compute in fp32, in fp64
};

// Defined in cpu/factored.cpp, once per instruction set.
#if defined(FT_X86)
namespace baseline { extern const FactoredIsa factored; }
namespace avx2 { extern const FactoredIsa factored; }
namespace avx512 { extern const FactoredIsa factored; }
#else
namespace portable { extern const FactoredIsa factored; }
#endif

constexpr i64 kTileRows = 64, kTileColumns = 2048;

// One parameter: `matrices` of `rows` by `columns` with factors of their second moment, or `columns` elements with it
// whole (`whole`, where matrices = rows = 1).
struct Factored {
  Stream p, g, row_var, column_var, variance;
  i64 matrices = 1, rows = 1, columns = 0;
  bool whole = false, wide = false;
  Counter counter;
  // The gradient's scale; what p is multiplied with; 1 - beta2; the step's relative size; epsilons; clipping threshold.
  double scale, keep, weight, rho, eps1, eps2, clip;

  i64 elements() const { return matrices * rows * columns; }
};

void step_factored(const std::vector<Factored>& works, int threads);

}  // namespace fasttrain
