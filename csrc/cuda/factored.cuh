// The CUDA step of Adafactor (fasttrain/kernels/factored.py has the mathematics): `sums` and `lines` make the means over
// rows and columns and move the states, `update` sums squares of parameters and updates, `apply` writes. Between them
// `tree` adds what they leave: rows of a matrix, tiles of a parameter. Every sum is made by one thread or one tree in one
// order, so that the grid and other parameters are no matter.
//
// A warp takes a tile: 64 rows at most, of 32 packs of 16 bytes, a few rows at a time. Where rows do not begin at multiples
// of 16 bytes, and at the ends of rows, elements are read and written one by one. A parameter whose second moment is kept
// whole is cut into rows as long as a tile's.
#pragma once
#include "cuda/elements.cuh"
#include "cuda/warp.cuh"

namespace fasttrain {
inline namespace FT_ISA {

constexpr u32 kTileLines = 64, kGroup = 32;  // rows of a tile; of which a lane keeps one

// A row of numbers: the gradient's scale; what p is multiplied with; the weight of new squares; the relative size of the
// step; two epsilons; the clipping threshold; elements.
struct FactoredNumbers {
  static constexpr int count = 8;
  double scale, keep, weight, rho, eps1, eps2, clip, elements;
  HOST_DEVICE explicit FactoredNumbers(const double* row)
      : scale(row[0]), keep(row[1]), weight(row[2]), rho(row[3]), eps1(row[4]), eps2(row[5]), clip(row[6]),
        elements(row[7]) {}
};

HOST_DEVICE double load_double(const char* at) {
  u64 bits;
  load_bits(at, bits);
  return bit_cast<double>(bits);
}
HOST_DEVICE void store_double(char* at, double x) { store_bits(at, bit_cast<u64>(x)); }
template <class T> HOST_DEVICE T no_less(T x, T least) { return x < least ? least : x; }  // a NaN stays

// A row of a table of tiles. Addresses are those of the tile's first element, row or column.
struct FactoredTile {
  static constexpr int columns_of_table = 14;
  char *p, *g;
  char* second;               // the whole second moment, or
  const char* rows_moved;     // the moved means of rows, in double, and
  const char* columns_moved;  // of columns; zero: it is whole
  u32 rows, columns;
  i64 stride;              // elements from row to row
  i64 row;                 // of numbers
  const char* matrix;      // the sum of the matrix's moved row means, and
  double lines;            // how many rows that are
  char* sums;              // of the tile
  const char* total;       // of the parameter
  char *row_parts, *column_parts;  // sums over the tile, one for each row and for each column

  HOST_DEVICE FactoredTile(const i64* words, const i64* gradient)
      : p(reinterpret_cast<char*>(words[0])), g(reinterpret_cast<char*>(*gradient)),
        second(reinterpret_cast<char*>(words[2])), rows_moved(second),
        columns_moved(reinterpret_cast<const char*>(words[3])), rows(static_cast<u32>(words[4])),
        columns(static_cast<u32>(words[5])), stride(words[6]), row(words[7]),
        matrix(reinterpret_cast<const char*>(words[8])), lines(static_cast<double>(words[9])),
        sums(reinterpret_cast<char*>(words[10])), total(reinterpret_cast<const char*>(words[11])),
        row_parts(reinterpret_cast<char*>(words[12])), column_parts(reinterpret_cast<char*>(words[13])) {}
};

template <u8 S> struct ComputedIn { using type = float; };
template <> struct ComputedIn<kF64> { using type = double; };

// `Together` rows are loaded before the first is computed with.
template <u8 S, int Together>
struct Factored {
  using T = typename ComputedIn<S>::type;
  static constexpr int bytes = storage_bytes(S), each = kAccess / bytes, together = Together;
  static constexpr u32 width = 32 * each;
  static constexpr int columns = FactoredTile::columns_of_table;
  using Packs = Pack<bytes, each>[together];

  // --- Packs of `together` rows of a tile, from `row` on, one of each to a lane ---------------------------------------
  HOST_DEVICE static bool whole(const FactoredTile& tile, u32 row) {
    u32 past = static_cast<u32>(tile.stride * bytes);
    past |= static_cast<u32>(reinterpret_cast<u64>(tile.p)) | static_cast<u32>(reinterpret_cast<u64>(tile.g));
    if (tile.columns_moved == nullptr) past |= static_cast<u32>(reinterpret_cast<u64>(tile.second));
    return past % kAccess == 0 && tile.columns == width && row + together <= tile.rows;
  }
  HOST_DEVICE static char* place(char* from, const FactoredTile& tile, u32 row, u32 lane) {
    return from + (static_cast<i64>(row) * tile.stride + lane * each) * bytes;
  }
  HOST_DEVICE static bool inside(const FactoredTile& tile, u32 row, u32 lane, int e) {
    return row < tile.rows && lane * each + static_cast<u32>(e) < tile.columns;
  }
  HOST_DEVICE static void load(char* from, const FactoredTile& tile, u32 row, u32 lane, bool wide, Packs& packs) {
    if (wide) {
      FT_UNROLL
      for (int u = 0; u < together; ++u) packs[u].load(place(from, tile, row + static_cast<u32>(u), lane));
    } else {
      FT_UNROLL
      for (int u = 0; u < together; ++u) {
        packs[u].words[0] = Words{};
        const u32 here = row + static_cast<u32>(u);
        FT_UNROLL
        for (int e = 0; e < each; ++e) {
          Bits<bytes> bits = 0;
          if (inside(tile, here, lane, e)) load_bits(place(from, tile, here, lane) + e * bytes, bits);
          join<bytes>(packs[u].words[0], e, bits);
        }
      }
    }
  }
  HOST_DEVICE static void store(char* to, const FactoredTile& tile, u32 row, u32 lane, bool wide, const Packs& packs) {
    if (wide) {
      FT_UNROLL
      for (int u = 0; u < together; ++u) packs[u].store(place(to, tile, row + static_cast<u32>(u), lane));
    } else {
      FT_UNROLL
      for (int u = 0; u < together; ++u) {
        const u32 here = row + static_cast<u32>(u);
        FT_UNROLL
        for (int e = 0; e < each; ++e)
          if (inside(tile, here, lane, e)) store_bits(place(to, tile, here, lane) + e * bytes, packs[u].get(e));
      }
    }
  }

  // --- Sums of squares of the gradient's rows and columns --------------------------------------------------------------
  struct Summed {
    double columns[each];
    double rows[together];
    double mine;  // of the group's row that has this lane's number
  };
  struct SumsKernel {
    static constexpr int columns = Factored::columns;
    HOST_DEVICE static void tile(const FactoredTile& tile, const double*) {
      Warp<Summed> warp;
      warp.each([](Summed& held, u32) {
        FT_UNROLL
        for (int e = 0; e < each; ++e) held.columns[e] = 0.0;
      });
      for (u32 group = 0; group < tile.rows; group += kGroup) {
        warp.each([](Summed& held, u32) { held.mine = 0.0; });
        for (u32 row = group; row < tile.rows && row < group + kGroup; row += together) {
          const bool wide = whole(tile, row);
          warp.each([&](Summed& held, u32 lane) {
            Packs g;
            load(tile.g, tile, row, lane, wide, g);
            FT_UNROLL
            for (int u = 0; u < together; ++u) {
              held.rows[u] = 0.0;
              FT_UNROLL
              for (int e = 0; e < each; ++e) {
                const double x = decode<double, S>(g[u].get(e)), square = x * x;
                held.rows[u] += square;
                held.columns[e] += square;
              }
            }
          });
          FT_UNROLL
          for (int u = 0; u < together; ++u)
            warp.template add_across<32>([u](Summed& held) -> double& { return held.rows[u]; });
          warp.each([&](Summed& held, u32 lane) {
            FT_UNROLL
            for (int u = 0; u < together; ++u)
              if (lane == row - group + static_cast<u32>(u)) held.mine = held.rows[u];
          });
        }
        warp.each([&](Summed& held, u32 lane) {
          if (group + lane < tile.rows) store_double(tile.row_parts + i64{group + lane} * 8, held.mine);
        });
      }
      warp.each([&](Summed& held, u32 lane) {
        FT_UNROLL
        for (int e = 0; e < each; ++e)
          if (lane * each + static_cast<u32>(e) < tile.columns)
            store_double(tile.column_parts + (lane * each + static_cast<u32>(e)) * 8, held.columns[e]);
      });
    }
  };

  // --- The update, before and after its size is known ------------------------------------------------------------------
  struct Updated {
    T factors[each];  // of columns
    T row;            // of the group's row that has this lane's number
    T rows[together];
    Sums sums;
  };

  HOST_DEVICE static T moved(T v, T x, const FactoredNumbers& k) {
    return without_denormal(static_cast<T>(1 - k.weight) * v + static_cast<T>(k.weight) * x * x);
  }

  template <bool Write>
  struct Pass {
    static constexpr int columns = Factored::columns;

    HOST_DEVICE static void tile(const FactoredTile& tile, const double* numbers) {
      const FactoredNumbers k(numbers + tile.row * FactoredNumbers::count);
      const bool factored = tile.columns_moved != nullptr;
      const T rate = Write ? static_cast<T>(rate_of(tile, k)) : T(0);
      Warp<Updated> warp;
      warp.each([&](Updated& held, u32 lane) {
        held.sums = {0.0, 0.0};
        FT_UNROLL
        for (int e = 0; e < each; ++e) {
          const u32 column = lane * each + static_cast<u32>(e);
          held.factors[e] = T(1);
          if (factored && column < tile.columns) held.factors[e] = static_cast<T>(load_double(tile.columns_moved + column * 8));
        }
      });
      for (u32 group = 0; group < tile.rows; group += kGroup) {
        warp.each([&](Updated& held, u32 lane) {
          held.row = T(1);
          if (factored && group + lane < tile.rows) {
            const double mean = load_double(tile.matrix) / tile.lines;
            held.row = static_cast<T>(load_double(tile.rows_moved + i64{group + lane} * 8) / no_less(mean, k.eps1));
          }
        });
        for (u32 row = group; row < tile.rows && row < group + kGroup; row += together) {
          const bool wide = whole(tile, row);
          FT_UNROLL
          for (int u = 0; u < together; ++u) {
            const T factor = warp.of(row - group + static_cast<u32>(u), [](Updated& held) { return held.row; });
            warp.each([&](Updated& held, u32) { held.rows[u] = factor; });
          }
          warp.each([&](Updated& held, u32 lane) { several(held, lane, tile, row, wide, factored, rate, k); });
        }
      }
      if constexpr (!Write) {
        warp.template add_across<32>([](Updated& held) -> double& { return held.sums.a; });
        warp.template add_across<32>([](Updated& held) -> double& { return held.sums.b; });
        warp.each([&](Updated& held, u32 lane) {
          if (lane == 0) store_sums(tile.sums, held.sums.a, held.sums.b);
        });
      }
    }

    HOST_DEVICE static void several(Updated& held, u32 lane, const FactoredTile& tile, u32 row, bool wide, bool factored,
                                 T rate, const FactoredNumbers& k) {
      const T scale = static_cast<T>(k.scale), least = static_cast<T>(k.eps1 * k.eps1), keep = static_cast<T>(k.keep);
      Packs p, g, v;
      load(tile.p, tile, row, lane, wide, p);
      load(tile.g, tile, row, lane, wide, g);
      if (!factored) load(tile.second, tile, row, lane, wide, v);
      FT_UNROLL
      for (int u = 0; u < together; ++u) {
        T new_p[each], new_v[each];
        FT_UNROLL
        for (int e = 0; e < each; ++e) {
          const T x = decode<T, S>(g[u].get(e)) * scale, param = decode<T, S>(p[u].get(e));
          new_v[e] = factored ? held.rows[u] * held.factors[e] : moved(decode<T, S>(v[u].get(e)), x, k);
          const T second = no_less(new_v[e], least);
          if constexpr (Write) {
            new_p[e] = keep * param - rate * (x / square_root(second));
          } else if (wide || inside(tile, row + static_cast<u32>(u), lane, e)) {
            const double wider = static_cast<double>(param);
            held.sums.a += wider * wider;
            held.sums.b += static_cast<double>(x / second * x);  // its root is not taken to be squared again
          }
        }
        if constexpr (Write) {
          encode_all<S>(new_p, p[u]);
          if (!factored) encode_all<S>(new_v, v[u]);
        }
      }
      if constexpr (Write) {
        store(tile.p, tile, row, lane, wide, p);
        if (!factored) store(tile.second, tile, row, lane, wide, v);
      }
    }

    // As Python's max: a NaN on the right is not taken.
    HOST_DEVICE static double rate_of(const FactoredTile& tile, const FactoredNumbers& k) {
      const Sums total = load_sums(tile.total);
      const double root = square_root(k.elements), param = square_root(total.a) / root;
      const double update = square_root(total.b) / (root * k.clip);
      return (param > k.eps2 ? param : k.eps2) * k.rho / (update > 1.0 ? update : 1.0);
    }
  };

  // --- The states of rows or columns -----------------------------------------------------------------------------------
  // A row of the table is 32 lines at most: the address of their parts; how many of each; parts from line to line and
  // within one; the address of the states; that of the moved means, in double; that of their sum, or zero; lines; the row
  // of numbers; and how many elements a line has.
  struct LinesKernel {
    static constexpr int columns = 10, at_once = 8;
    struct Held {
      double moved;
    };
    HOST_DEVICE static void lines(const i64* words, const double* numbers) {
      const FactoredNumbers k(numbers + words[8] * FactoredNumbers::count);
      Warp<Held> warp;
      warp.each([&](Held& held, u32 lane) {
        held.moved = 0.0;
        if (static_cast<i64>(lane) >= words[7]) return;
        const char* parts = reinterpret_cast<const char*>(words[0]) + lane * words[2] * 8;
        double sum = 0.0;
        for (i64 i = 0; i < words[1]; i += at_once) {
          double part[at_once];
          FT_UNROLL
          for (int u = 0; u < at_once; ++u) {
            part[u] = 0.0;
            if (i + u < words[1]) part[u] = load_double(parts + (i + u) * words[3] * 8);
          }
          FT_UNROLL
          for (int u = 0; u < at_once; ++u) sum += part[u];
        }
        char* state = reinterpret_cast<char*>(words[4]) + lane * bytes;
        Bits<bytes> bits;
        load_bits(state, bits);
        const double mean = sum * (k.scale * k.scale) / static_cast<double>(words[9]);
        double moved = (1 - k.weight) * decode<double, S>(bits) + k.weight * mean;
        if constexpr (S == kF64) moved = without_denormal(moved);
        else if (without_denormal(static_cast<float>(moved)) == 0.0f) moved = 0.0;
        store_bits(state, encode<T, S>(static_cast<T>(moved)));
        store_double(reinterpret_cast<char*>(words[5]) + lane * 8, moved);
        held.moved = moved;
      });
      if (words[6] == 0) return;
      warp.template add_across<32>([](Held& held) -> double& { return held.moved; });
      warp.each([&](Held& held, u32 lane) {
        if (lane == 0) store_sums(reinterpret_cast<char*>(words[6]), held.moved, 0.0);
      });
    }
    HOST_DEVICE static void one(const i64* words, const double* numbers, const i64*) { lines(words, numbers); }
  };
  struct Measure : SumsKernel {
    HOST_DEVICE static void one(const i64* words, const double* numbers, const i64* gradient) {
      SumsKernel::tile(FactoredTile(words, gradient), numbers);
    }
  };
  template <bool Write> struct Update : Pass<Write> {
    HOST_DEVICE static void one(const i64* words, const double* numbers, const i64* gradient) {
      Pass<Write>::tile(FactoredTile(words, gradient), numbers);
    }
  };
};

// A warp for each row of the table.
template <class Kernel>
struct ByRow {
  static constexpr int columns = Kernel::columns;
  HOST_DEVICE static void walk(const i64* table, i64 rows, const double* numbers, const i64* gradients, Place place) {
    const i64 warps = i64{Warp<int>::count(place)} * place.blocks;
    for (i64 r = i64{Warp<int>::count(place)} * place.block + Warp<int>::number(place); r < rows; r += warps)
      Kernel::one(table + r * columns, numbers, gradient_of(gradients, r, table + r * columns + 1));
  }
};

}  // namespace FT_ISA
}  // namespace fasttrain

#define FASTTRAIN_FACTORED(X) \
  FT_FACTORED_OF(X, F32) FT_FACTORED_OF(X, F64) FT_FACTORED_OF(X, BF16) FT_FACTORED_OF(X, F16)
#define FT_FACTORED_OF(X, S) \
  X(S, rows, 4, Measure) X(S, lines, 1, LinesKernel) X(S, update, 2, Update<false>) X(S, apply, 2, Update<true>)

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FT_FACTORED_KERNEL(S, What, Together, Kernel)                                                     \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                    \
  factored_##What##_##S(const fasttrain::i64* table, fasttrain::i64 rows, const double* numbers,          \
                        const fasttrain::i64* gradients) {                                                \
    using namespace fasttrain;                                                                            \
    const Place place{threadIdx.x, blockDim.x, blockIdx.x, gridDim.x};                                    \
    ByRow<Factored<k##S, Together>::Kernel>::walk(table, rows, numbers, gradients, place);                \
  }
#ifndef FT_ON_DEMAND
FASTTRAIN_FACTORED(FT_FACTORED_KERNEL)
#endif
#endif
