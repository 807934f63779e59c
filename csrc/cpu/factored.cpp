// Kernels of factored second moments: compiled once per instruction set, like step.cpp, and under the same rules.
#include "cpu/factored.h"

#include "cpu/lanes.h"
#include "cpu/staged.h"

namespace fasttrain {
inline namespace FT_ISA {
namespace {

constexpr i64 kPiece = 512;  // elements converted at once

template <class T>
void add_row_and_columns(const T* __restrict g, i64 n, double* __restrict row, double* __restrict columns) {
  double lanes[kLanes];
  for (int j = 0; j < kLanes; ++j) lanes[j] = row[j];
  const i64 whole = n / kLanes * kLanes;
  for (i64 i = 0; i < whole; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const double x = static_cast<double>(g[i + j]), square = x * x;
      lanes[j] += square;
      columns[i + j] += square;
    }
  }
  for (int j = 0; j < kLanes; ++j) row[j] = lanes[j];
  for (i64 i = whole; i < n; ++i) {
    const double x = static_cast<double>(g[i]), square = x * x;
    row[i - whole] += square;
    columns[i] += square;
  }
}

template <class T>
void sums(const Stream& g, const Tile& tile, double* rows, i64 row_step, double* columns) {
  alignas(64) T staged[kPiece];
  for (i64 r = 0; r < tile.rows; ++r) {
    double lanes[kLanes] = {};
    for (i64 c = 0; c < tile.columns; c += kPiece) {
      const i64 n = tile.columns - c < kPiece ? tile.columns - c : kPiece;
      add_row_and_columns(read(g, tile.at + r * tile.stride + c, n, staged), n, lanes, columns + c);
    }
    rows[r * row_step] += tree(lanes, kLanes);
  }
}

template <class T>
HOST_DEVICE T at_least(T x, T least) { return x < least ? least : x; }  // a NaN stays

template <class T>
void squares_of_update(const T* __restrict g, i64 n, T row, const T* __restrict columns, T scale, T least,
                       T* __restrict to) {
  for (i64 i = 0; i < n; ++i) {
    const T x = g[i] * scale;
    to[i] = x / at_least(row * columns[i], least) * x;  // its root is not taken to be squared again
  }
}

template <class T>
double update_squares(const Stream& g, const Tile& tile, const void* rows, const void* columns, const FactoredScalars& k) {
  alignas(64) T staged[kPiece], squares[kPiece];
  double lanes[kLanes] = {};
  for (i64 r = 0; r < tile.rows; ++r) {
    for (i64 c = 0; c < tile.columns; c += kPiece) {
      const i64 n = tile.columns - c < kPiece ? tile.columns - c : kPiece;
      squares_of_update(read(g, tile.at + r * tile.stride + c, n, staged), n, static_cast<const T*>(rows)[r],
                        static_cast<const T*>(columns) + c, static_cast<T>(k.scale), static_cast<T>(k.least), squares);
      add_to_lanes<Itself>(lanes, squares, n);
    }
  }
  return tree(lanes, kLanes);
}

template <class T>
void apply_row(const T* from, T* p, const T* __restrict g, i64 n, T row, const T* __restrict columns, T scale, T least,
               T keep, T rate) {
#pragma GCC ivdep
  for (i64 i = 0; i < n; ++i) {
    const T update = g[i] * scale / square_root(at_least(row * columns[i], least));
    p[i] = keep * from[i] - rate * update;
  }
}

template <class T>
void apply(const Stream& p, const Stream& g, const Tile& tile, const void* rows, const void* columns,
           const FactoredScalars& k) {
  alignas(64) T staged[kPiece], param[kPiece];
  for (i64 r = 0; r < tile.rows; ++r) {
    for (i64 c = 0; c < tile.columns; c += kPiece) {
      const i64 n = tile.columns - c < kPiece ? tile.columns - c : kPiece, at = tile.at + r * tile.stride + c;
      T* to = place(p, at, param);
      apply_row(read(p, at, n, param), to, read(g, at, n, staged), n, static_cast<const T*>(rows)[r],
                static_cast<const T*>(columns) + c, static_cast<T>(k.scale), static_cast<T>(k.least),
                static_cast<T>(k.keep), static_cast<T>(k.rate));
      write(p, at, n, to);
    }
  }
}

template <class T>
void lerp(T* __restrict to, const T* __restrict v, const T* __restrict g, i64 n, T scale, T keep, T weight) {
  for (i64 i = 0; i < n; ++i) {
    const T x = g[i] * scale;
    to[i] = without_denormal(keep * v[i] + weight * x * x);
  }
}

template <class T>
void moment(const Stream& v, const Stream& g, i64 begin, i64 n, double scale, double weight, void* to, bool store) {
  alignas(64) T staged[kPiece], old[kPiece];
  for (i64 from = 0; from < n; from += kPiece) {
    const i64 some = n - from < kPiece ? n - from : kPiece;
    T* part = static_cast<T*>(to) + from;
    lerp(part, read(v, begin + from, some, old), read(g, begin + from, some, staged), some, static_cast<T>(scale),
         static_cast<T>(1 - weight), static_cast<T>(weight));
    if (!store) continue;
    write(v, begin + from, some, part);
    T* in_place = place(v, begin + from, part);
    for (i64 i = 0; in_place != part && i < some; ++i) in_place[i] = part[i];
  }
}

template <class T>
constexpr FactoredKernels kernels_of() {
  return {sums<T>, update_squares<T>, apply<T>, moment<T>};
}

}  // namespace
}  // namespace FT_ISA

namespace FT_ISA {
extern const FactoredIsa factored;
const FactoredIsa factored{kernels_of<float>(), kernels_of<double>()};
}  // namespace FT_ISA
}  // namespace fasttrain
