// Parameters are taken in groups that fit the cache, each through its passes. A sum has the same bits whoever makes it:
// tiles and chunks are fixed, and combined in a fixed order.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <deque>
#include <utility>

#include "codecs.h"
#include "cpu/chosen.h"
#include "cpu/factored.h"
#include "cpu/lanes.h"
#include "cpu/norm.h"
#include "cpu/share.h"

namespace fasttrain {
namespace {

constexpr i64 kSmall = 1 << 17;  // elements that one thread takes through all passes, at most
constexpr i64 kGroup = 1 << 21;  // elements of a group of larger parameters, at least
constexpr i64 kTensor = 256;     // what a tensor costs beyond its elements, in elements
constexpr i64 kBatch = 1 << 14;  // elements that a thread takes at once, at least
constexpr i64 kAlone = 1 << 15;  // elements below which waking a second thread costs more than it brings

// What one parameter needs between its passes; memory that is kept from one to the next.
struct Passing {
  const Factored* work = nullptr;
  const FactoredKernels* kernels = nullptr;
  i64 row_tiles = 0, column_tiles = 0, chunks = 0;
  std::vector<double> row_sums, column_sums;          // of each column tile, of each row tile
  std::vector<float> narrow_rows, narrow_columns;     // factors
  std::vector<double> wide_rows, wide_columns;
  std::vector<double> param_squares, update_squares;  // of each chunk, of each tile
  FactoredScalars scalars{};
  i64 index = 0;  // in its group

  i64 tiles() const { return work->matrices * row_tiles * column_tiles; }

  // Tile t, in the order of memory of matrices, row tiles and column tiles.
  struct At {
    i64 matrix, row, column;
    Tile tile;
  };
  At at(i64 t) const {
    const Factored& w = *work;
    const i64 matrix = t / (row_tiles * column_tiles), inside = t % (row_tiles * column_tiles);
    const i64 row = inside / column_tiles * kTileRows, column = inside % column_tiles * kTileColumns;
    return {matrix, row, column,
            {(matrix * w.rows + row) * w.columns + column, std::min(kTileRows, w.rows - row),
             std::min(kTileColumns, w.columns - column), w.columns}};
  }
  const void* row_factors(i64 i) const {
    return work->wide ? static_cast<const void*>(wide_rows.data() + i) : narrow_rows.data() + i;
  }
  const void* column_factors(i64 i) const {
    return work->wide ? static_cast<const void*>(wide_columns.data() + i) : narrow_columns.data() + i;
  }

  void moment(const Tile& tile, double* to, bool store) const {
    kernels->moment(work->variance, work->g, tile.at, tile.columns, work->scale, work->weight, to, store);
  }

  void prepare(const Factored& next);
  void square_params(i64 chunk);
  void sum(i64 t);
  void factor();
  void square(i64 t);
  void finish();
  void apply(i64 t) const;
};

void Passing::prepare(const Factored& next) {
  work = &next;
  kernels = next.wide ? &FT_CHOSEN(factored).wide : &FT_CHOSEN(factored).narrow;
  row_tiles = (next.rows + kTileRows - 1) / kTileRows;
  column_tiles = (next.columns + kTileColumns - 1) / kTileColumns;
  chunks = (next.elements() + kSumChunk - 1) / kSumChunk;
  param_squares.assign(static_cast<size_t>(chunks), 0.0);
  update_squares.assign(static_cast<size_t>(tiles()), 0.0);
  scalars = {next.scale, next.eps1 * next.eps1, next.keep, 0.0};
  if (next.whole) {
    narrow_rows.assign(1, 1.0f);
    wide_rows.assign(1, 1.0);
    return;
  }
  row_sums.assign(static_cast<size_t>(next.matrices * next.rows * column_tiles), 0.0);
  column_sums.assign(static_cast<size_t>(next.matrices * row_tiles * next.columns), 0.0);
}

void Passing::square_params(i64 chunk) {
  bool nonfinite = false;
  const i64 begin = chunk * kSumChunk, end = std::min(begin + kSumChunk, work->elements());
  param_squares[chunk] = FT_CHOSEN(squares)(work->p, begin, end, &nonfinite);
}

// Pass 1: sums of squares of the gradient's rows and columns, or, with the whole second moment, the update's squares.
void Passing::sum(i64 t) {
  const At a = at(t);
  if (work->whole) {
    alignas(64) double buffer[kTileColumns];
    moment(a.tile, buffer, false);
    update_squares[t] = kernels->update_squares(work->g, a.tile, row_factors(0), buffer, scalars);
    return;
  }
  kernels->sums(work->g, a.tile, row_sums.data() + (a.matrix * work->rows + a.row) * column_tiles + a.column / kTileColumns,
                column_tiles,
                column_sums.data() + (a.matrix * row_tiles + a.row / kTileRows) * work->columns + a.column);
}

// The new factors: states are stored, and what the update multiplies is kept. In double until it is rounded once.
void Passing::factor() {
  const Factored& w = *work;
  if (w.whole || w.elements() == 0) return;
  const double scale = w.scale * w.scale;
  narrow_rows.resize(w.wide ? 0 : static_cast<size_t>(w.matrices * w.rows));
  narrow_columns.resize(w.wide ? 0 : static_cast<size_t>(w.matrices * w.columns));
  wide_rows.resize(static_cast<size_t>(w.matrices * w.rows));
  wide_columns.resize(static_cast<size_t>(w.matrices * w.columns));
  const auto lerp = [&](const Stream& state, i64 i, double mean) {
    const double old = load_element<double>(state.at, state.storage, i);
    double moved = (1 - w.weight) * old + w.weight * mean;
    // As every state: nothing that a rule's type holds as a denormal.
    moved = w.wide ? without_denormal(moved) : without_denormal(static_cast<float>(moved)) == 0.0f ? 0.0 : moved;
    state.storage == kF64 ? store_element(state.at, kF64, i, moved)
                          : store_element(state.at, state.storage, i, static_cast<float>(moved));
    return moved;
  };
  for (i64 m = 0; m < w.matrices; ++m) {
    double* rows = wide_rows.data() + m * w.rows;
    double total = 0;
    for (i64 r = 0; r < w.rows; ++r) {
      const double sum = tree(row_sums.data() + (m * w.rows + r) * column_tiles, column_tiles);
      rows[r] = lerp(w.row_var, m * w.rows + r, sum * scale / static_cast<double>(w.columns));
      total += rows[r];
    }
    const double mean = total / static_cast<double>(w.rows);
    for (i64 r = 0; r < w.rows; ++r) rows[r] /= mean < w.eps1 ? w.eps1 : mean;
    double* columns = wide_columns.data() + m * w.columns;
    for (i64 c = 0; c < w.columns; ++c) columns[c] = 0;
    for (i64 tile = 0; tile < row_tiles; ++tile) {
      const double* some = column_sums.data() + (m * row_tiles + tile) * w.columns;
      for (i64 c = 0; c < w.columns; ++c) columns[c] += some[c];
    }
    for (i64 c = 0; c < w.columns; ++c)
      columns[c] = lerp(w.column_var, m * w.columns + c, columns[c] * scale / static_cast<double>(w.rows));
  }
  for (size_t i = 0; i < narrow_rows.size(); ++i) narrow_rows[i] = static_cast<float>(wide_rows[i]);
  for (size_t i = 0; i < narrow_columns.size(); ++i) narrow_columns[i] = static_cast<float>(wide_columns[i]);
}

// Pass 2, where the factors are known: squares of the update.
void Passing::square(i64 t) {
  if (work->whole) return;
  const At a = at(t);
  update_squares[t] = kernels->update_squares(work->g, a.tile, row_factors(a.matrix * work->rows + a.row),
                                              column_factors(a.matrix * work->columns + a.column), scalars);
}

void Passing::finish() {
  const double n = static_cast<double>(work->elements());
  const double param = std::sqrt(tree(param_squares.data(), chunks)) / std::sqrt(n);
  const double update = std::sqrt(tree(update_squares.data(), tiles())) / (std::sqrt(n) * work->clip);
  // As Python's max: a NaN on the right is not taken.
  const double alpha = (param > work->eps2 ? param : work->eps2) * work->rho;
  scalars.rate = alpha / (update > 1.0 ? update : 1.0);
  work->counter.increment();
}

void Passing::apply(i64 t) const {
  const At a = at(t);
  if (work->whole) {
    alignas(64) double buffer[kTileColumns];
    moment(a.tile, buffer, true);  // only now, so that it is rounded once, and used as it was before
    kernels->apply(work->p, work->g, a.tile, row_factors(0), buffer, scalars);
    return;
  }
  kernels->apply(work->p, work->g, a.tile, row_factors(a.matrix * work->rows + a.row),
                 column_factors(a.matrix * work->columns + a.column), scalars);
}

// Whether two tensors that are written share memory: then parameters are stepped one after the other.
bool share_memory(const std::vector<Factored>& works) {
  std::vector<std::pair<const char*, const char*>> spans;
  const auto add = [&](const Stream& stream, i64 n) {
    if (n != 0) spans.emplace_back(stream.at, stream.at + n * storage_bytes(stream.storage));
  };
  for (const Factored& work : works) {
    add(work.p, work.elements());
    if (work.whole) add(work.variance, work.elements());
    if (!work.whole) add(work.row_var, work.matrices * work.rows);
    if (!work.whole) add(work.column_var, work.matrices * work.columns);
  }
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i)
    if (spans[i].first < spans[i - 1].second) return true;
  return false;
}

// A parameter that one thread takes through all its passes, from its cache.
void step_alone(const Factored& work) {
  static thread_local Passing passing;  // its memory is allocated by the first step
  passing.prepare(work);
  for (i64 c = 0; c < passing.chunks; ++c) passing.square_params(c);
  for (i64 t = 0; t < passing.tiles(); ++t) passing.sum(t);
  passing.factor();
  for (i64 t = 0; t < passing.tiles(); ++t) passing.square(t);
  passing.finish();
  for (i64 t = 0; t < passing.tiles(); ++t) passing.apply(t);
}

// Tiles [begin, end) of a parameter, or, with `chunk`, chunk `begin` of it.
struct Piece {
  Passing* passing;
  i64 begin, end;
  bool chunk;
};

// Large parameters: all threads share the tiles of a group, pass by pass.
void step_together(const Factored* const* works, i64 count, int threads) {
  static thread_local std::deque<Passing> kept;
  while (static_cast<i64>(kept.size()) < count) kept.emplace_back();
  std::deque<Passing>& passings = kept;  // this thread's, also where the others read it
  std::vector<Piece> pieces;
  for (i64 i = 0; i < count; ++i) {
    Passing& passing = passings[i];
    passing.prepare(*works[i]);
    const i64 tiles = passing.tiles(), each = std::max<i64>(1, kBatch * tiles / works[i]->elements());
    for (i64 t = 0; t < tiles; t += each) pieces.push_back({&passing, t, std::min(t + each, tiles), false});
    for (i64 c = 0; c < passing.chunks; ++c) pieces.push_back({&passing, c, c + 1, true});
  }
  // The thread that does a parameter's last piece does what comes between the passes.
  std::vector<std::atomic<i64>> left(static_cast<size_t>(count));
  const auto pass = [&](const auto& each, const auto& then) {
    for (auto& one : left) one = 0;
    for (const Piece& piece : pieces) ++left[piece.passing->index];
    share(static_cast<i64>(pieces.size()), threads, [&](i64 i) {
      each(pieces[i]);
      if (left[pieces[i].passing->index].fetch_sub(1) == 1) then(*pieces[i].passing);
    });
  };
  for (i64 i = 0; i < count; ++i) passings[i].index = i;
  pass([](const Piece& piece) {
    if (piece.chunk) return piece.passing->square_params(piece.begin);
    for (i64 t = piece.begin; t < piece.end; ++t) piece.passing->sum(t);
  }, [](Passing& passing) { passing.factor(); });
  pass([](const Piece& piece) {
    if (piece.chunk) return;
    for (i64 t = piece.begin; t < piece.end; ++t) piece.passing->square(t);
  }, [](Passing& passing) { passing.finish(); });
  pass([](const Piece& piece) {
    if (piece.chunk) return;
    for (i64 t = piece.begin; t < piece.end; ++t) piece.passing->apply(t);
  }, [](Passing&) {});
}

}  // namespace

void step_factored(const std::vector<Factored>& works, int threads) {
  if (share_memory(works)) {
    const FloatingPointMode mode;
    for (const Factored& work : works) step_alone(work);
    return;
  }
  std::vector<const Factored*> small, large;
  std::vector<i64> batches{0};
  i64 taken = 0, all = 0;
  for (const Factored& work : works) {
    if (work.elements() > kSmall) {
      large.push_back(&work);
      continue;
    }
    small.push_back(&work);
    all += work.elements() + kTensor;
    if ((taken += work.elements() + kTensor) < kBatch) continue;
    batches.push_back(static_cast<i64>(small.size()));
    taken = 0;
  }
  if (batches.back() != static_cast<i64>(small.size())) batches.push_back(static_cast<i64>(small.size()));
  share(static_cast<i64>(batches.size()) - 1, all < kAlone ? 1 : threads, [&](i64 batch) {
    for (i64 i = batches[batch]; i < batches[batch + 1]; ++i) step_alone(*small[i]);
  });
  for (size_t first = 0; first < large.size();) {
    i64 elements = 0;
    size_t last = first;
    while (last < large.size() && elements < kGroup) elements += large[last++]->elements();
    step_together(large.data() + first, static_cast<i64>(last - first), threads);
    first = last;
  }
}

}  // namespace fasttrain
