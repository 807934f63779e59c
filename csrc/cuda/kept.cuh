// The CUDA step of tensors that are not plain: a warp owns tiles of 256 elements, which are whole blocks of codes that
// share a unit, and finds a block's largest magnitude in one instruction. Elements are held as eight.cuh says.
//
// Lanes exchange nothing else, and no thread waits for another, so g++ compiles the same text (warp.cuh).
#pragma once
#include "cuda/eight.cuh"
#include "cuda/warp.cuh"
#include "rules.h"

namespace fasttrain {
inline namespace FT_ISA {

constexpr int kTilesTogether = 2;  // that a warp loads before it computes on the first

// The codecs of p, g and the states, and where their arrays are in the table (fasttrain/kernels/kept_table.py).
template <u8... C>
struct Operands {
  static constexpr int count = sizeof...(C);
  HOST_DEVICE static constexpr u8 codec(int i) {
    const u8 all[] = {C...};
    return all[i];
  }
  HOST_DEVICE static constexpr int extras_before(int i) {
    int found = 0;
    for (int j = 0; j < i; ++j) found += extra_size(codec(j)) > 0;
    return found;
  }
  HOST_DEVICE static constexpr int random_before(int i) {
    int found = 0;
    for (int j = 0; j < i; ++j) found += (codec(j) & kStochastic) != 0;
    return found;
  }
  static constexpr int arrays = count + extras_before(count);
  // The column of a second array; of the first, where there is none.
  template <int I> static constexpr int extra_column = extra_size(codec(I)) > 0 ? count + extras_before(I) : I;
  static constexpr int columns = arrays + 3 + (random_before(count) > 0 ? 4 : 0);
};

template <int I, u8 C> struct Slot { Lane<C> lane; };
template <class I, u8... C> struct Slots;
template <int... I, u8... C> struct Slots<Indices<I...>, C...> : Slot<I, C>... {};

template <class Rule, u8 P, u8 G, u8... S>
struct KeptStep {
  using O = Operands<P, G, S...>;
  using K = typename Rule::K;
  using Every = typename Upto<2 + sizeof...(S)>::type;
  using OfStates = typename Upto<sizeof...(S)>::type;
  static_assert(sizeof...(S) == Rule::states, "one codec for each state");
  static constexpr int states = Rule::states, room = states > 0 ? states : 1, after = 1 + Rule::coefficients;
  static constexpr int random = O::random_before(O::count), width = after + 3 + 2 * random;  // of a row

  // What one lane holds of one tile.
  struct Held : Slots<Every, P, G, S...> {
    float p[kEach], s[room][kEach];  // new, until they are encoded
    u32 at;                          // first element
  };
  template <int I> HOST_DEVICE static Lane<O::codec(I)>& lane(Held& held) {
    return static_cast<Slot<I, O::codec(I)>&>(held).lane;
  }

  // All that is read of a chunk's row in the table and of its coefficients, once.
  struct Chunk {
    Arrays arrays[O::count];
    K k;
    float scale, limit;
    u32 elements, flags;
    u32 zero;  // the upper half of the count, of which the compiler does not know that it is zero
    Source sources[random > 0 ? random : 1];

    HOST_DEVICE Chunk(const i64* chunk, const float* row, const i64* gradient)
        : k(row + 1), scale(row[0]), limit(row[after]), elements(static_cast<u32>(chunk[O::arrays])),
          flags(static_cast<u32>(chunk[O::arrays + 2])), zero(static_cast<u32>(chunk[O::arrays] >> 32)) {
      read_addresses(chunk, Every());
      arrays[1].main = reinterpret_cast<char*>(*gradient);
      FT_UNROLL
      for (int r = 0; r < random; ++r) {
        const float* words = row + after + 3 + 2 * r;
        const i64* place = chunk + O::arrays + 3;
        sources[r].key = bit_cast<u32>(words[0]) | static_cast<u64>(bit_cast<u32>(words[1])) << 32;
        sources[r].run = {place[0], place[3], static_cast<u32>(place[1]), static_cast<u32>(place[2])};
      }
    }
    template <int... I> HOST_DEVICE void read_addresses(const i64* chunk, Indices<I...>) {
      ((arrays[I] = {reinterpret_cast<char*>(chunk[I]), reinterpret_cast<char*>(chunk[O::template extra_column<I>])}), ...);
    }
  };

  template <int... I>
  HOST_DEVICE static void load(Held& held, const Chunk& chunk, Indices<I...>) {
    (lane<I>(held).load(chunk.arrays[I], held.at), ...);
  }
  template <int... I>
  HOST_DEVICE static void load_first(Held& held, const Chunk& chunk, u32 count, Indices<I...>) {
    (lane<I>(held).load_first(chunk.arrays[I], held.at, count), ...);
  }
  template <int... I>
  HOST_DEVICE static void store(Held& held, const Chunk& chunk, Indices<I...>) {
    lane<0>(held).store(chunk.arrays[0], held.at);
    (lane<2 + I>(held).store(chunk.arrays[2 + I], held.at), ...);
    if ((chunk.flags & 2) != 0) nothing().store(chunk.arrays[1], held.at);
  }
  template <int... I>
  HOST_DEVICE static void store_first(Held& held, const Chunk& chunk, u32 count, Indices<I...>) {
    lane<0>(held).store_first(chunk.arrays[0], held.at, count);
    (lane<2 + I>(held).store_first(chunk.arrays[2 + I], held.at, count), ...);
    if ((chunk.flags & 2) != 0) nothing().store_first(chunk.arrays[1], held.at, count);
  }
  HOST_DEVICE static Lane<G> nothing() {
    Lane<G> zeros;
    FT_UNROLL
    for (u32& word : zeros.main.word) word = 0;
    return zeros;
  }
  template <int... I>
  HOST_DEVICE static u32 any(Held& held, Indices<I...>) { return (lane<I>(held).any() | ...); }

  template <int... I>
  HOST_DEVICE static void compute(Held& held, const Chunk& chunk, float scale, Indices<I...>) {
    float g[kEach];
    lane<0>(held).decode(held.p);
    lane<1>(held).decode(g);
    (lane<2 + I>(held).decode(held.s[I]), ...);
    FT_UNROLL
    for (int e = 0; e < kEach; ++e) g[e] = g[e] * scale;
    if (chunk.limit <= 0x1.fffffep127f) {
      FT_UNROLL
      for (int e = 0; e < kEach; ++e) g[e] = clipped(g[e], chunk.limit);
    }
    FT_UNROLL
    for (int e = 0; e < kEach; ++e) {
      Rule::element(held.p[e], g[e], held.s[I][e]..., chunk.k);
      ((held.s[I][e] = without_denormal(held.s[I][e])), ...);
    }
  }

  template <int I>
  HOST_DEVICE static void encode(Warp<Held>& warp, const Chunk& chunk) {
    u32 largest = 0;
    if constexpr (Lane<O::codec(I)>::blocks)
      largest = warp.largest([](Held& held) { return largest_of(I == 0 ? held.p : held.s[I - 2]); });
    warp.each([&](Held& held, u32) {
      u32 draws[kEach];
      if constexpr ((O::codec(I) & kStochastic) != 0) chunk.sources[O::random_before(I)].draw(held.at, draws);
      lane<I>(held).encode(I == 0 ? held.p : held.s[I < 2 ? 0 : I - 2], largest, draws);
    });
  }
  template <int... I>
  HOST_DEVICE static void update(Warp<Held>& warp, const Chunk& chunk, float scale, u32 count, Indices<I...>) {
    warp.each([&](Held& held, u32 lane_number) {
      compute(held, chunk, scale, OfStates());
      FT_UNROLL
      for (int e = 0; e < kEach; ++e) {  // what lies outside of the chunk counts as zero
        if (lane_number * kEach + static_cast<u32>(e) < count) continue;
        held.p[e] = 0.0f;
        ((held.s[I][e] = 0.0f), ...);
      }
    });
    encode<0>(warp, chunk);
    (encode<2 + I>(warp, chunk), ...);
  }

  HOST_DEVICE static void walk(const i64* table, i64 chunks, const float* rows, const i64* gradients, Place place) {
    const u32 number = Warp<Held>::number(place), warps = Warp<Held>::count(place);
    for (i64 c = place.block; c < chunks; c += place.blocks) {
      const i64* here = table + c * O::columns;
      const Chunk chunk(here, rows + here[O::arrays + 1] * width, gradient_of(gradients, c, here + 1));
      const bool aligned = (chunk.flags & 1) != 0 && reinterpret_cast<u64>(chunk.arrays[1].main) % kAccess == 0;
      const u32 tiles = aligned ? chunk.elements / kTile : 0;  // in which every access is wide
      for (u32 first = number; first < tiles; first += kTilesTogether * warps) {
        Warp<Held> warp[kTilesTogether];
        u32 arrived = 0;
        FT_UNROLL
        for (int u = 0; u < kTilesTogether; ++u) {
          const u32 tile = first + static_cast<u32>(u) * warps;
          warp[u].each([&](Held& held, u32 lane_number) {
            held.at = (tile < tiles ? tile : first) * kTile + lane_number * kEach;  // past the end: dropped below
            load(held, chunk, Every());
            arrived |= any(held, Every());
          });
        }
        // Unchanged, but known only when everything has arrived: ptxas moves a load down to its first use.
        const float scale = float_of(bit_cast<u32>(chunk.scale) | (arrived & chunk.zero));
        FT_UNROLL
        for (int u = 0; u < kTilesTogether; ++u) {
          update(warp[u], chunk, scale, kTile, OfStates());
          if (u == 0 || first + static_cast<u32>(u) * warps < tiles)
            warp[u].each([&](Held& held, u32) { store(held, chunk, OfStates()); });
        }
      }
      const u32 all = (chunk.elements + kTile - 1) / kTile;
      for (u32 tile = tiles + number; tile < all; tile += warps) {
        const u32 left = chunk.elements - tile * kTile, count = left < kTile ? left : kTile;
        Warp<Held> warp;
        warp.each([&](Held& held, u32 lane_number) {
          held.at = tile * kTile + lane_number * kEach;
          load_first(held, chunk, mine(count, lane_number), Every());
        });
        update(warp, chunk, chunk.scale, count, OfStates());
        warp.each([&](Held& held, u32 lane_number) {
          store_first(held, chunk, mine(count, lane_number), OfStates());
        });
      }
    }
  }
  HOST_DEVICE static u32 mine(u32 count, u32 lane_number) {  // of the tile's elements, as a number for `< count`
    const u32 before = lane_number * kEach;
    return count > before ? count - before : 0;
  }
};

// The codecs by their names in the kernels' names.
namespace codes {
constexpr u8 F32 = kF32, F64 = kF64, BF16 = kBF16, F16 = kF16, BF16S = kBF16 | kStochastic, SPLIT16 = kSplit16,
             SPLIT8 = kSplit8, MASTERBF16 = kMasterBF16, INT8 = kInt8, INT8P = kInt8 | kPositive;
}

}  // namespace FT_ISA
}  // namespace fasttrain

// The combinations that are compiled ahead of time: codecs of parameter, gradient and states.
#define FASTTRAIN_KEPT(X1, X2)                  \
  X2(AdamW, SPLIT16, BF16, F32, F32)            \
  X2(AdamW, SPLIT16, BF16, BF16, BF16)          \
  X2(AdamW, SPLIT16, BF16, BF16S, BF16S)        \
  X2(AdamW, SPLIT16, BF16, INT8, INT8P)         \
  X2(AdamW, SPLIT8, BF16, INT8, INT8P)          \
  X2(AdamW, BF16S, BF16, INT8, INT8P)           \
  X2(AdamW, MASTERBF16, BF16, F32, F32)         \
  X1(Lion, SPLIT16, BF16, INT8)                 \
  X1(SGDMomentum, SPLIT16, BF16, INT8)

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FT_KEPT_KERNEL(Name, Rule, ...)                                                                   \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                    \
  Name(const fasttrain::i64* table, fasttrain::i64 chunks, const float* rows,                             \
       const fasttrain::i64* gradients) {                                                                 \
    using namespace fasttrain;                                                                            \
    using namespace fasttrain::codes;                                                                     \
    const Place place{threadIdx.x, blockDim.x, blockIdx.x, gridDim.x};                                    \
    KeptStep<Rule<float>, __VA_ARGS__>::walk(table, chunks, rows, gradients, place);                      \
  }
#define FT_KEPT_1(Rule, P, G, S) FT_KEPT_KERNEL(kept_##Rule##_##P##_##G##_##S, Rule, P, G, S)
#define FT_KEPT_2(Rule, P, G, S, Z) FT_KEPT_KERNEL(kept_##Rule##_##P##_##G##_##S##_##Z, Rule, P, G, S, Z)
#ifndef FT_ON_DEMAND
FASTTRAIN_KEPT(FT_KEPT_1, FT_KEPT_2)
#endif
#endif
