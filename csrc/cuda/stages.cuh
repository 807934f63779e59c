// The CUDA walk of stages: rules whose elements' terms are summed (stage_rules.h), by the order of cpu/lanes.h, and which
// write only what they change.
//
// A warp takes blocks of 4,096 elements. Operands are read and written as step.cu does; each element's terms go through
// shared memory to the lanes that they belong to, where one half of the warp adds the first term and the other the
// second. In a block, places are counted from the last element at or before its start that is aligned like the first
// aligned one: packs lie at multiples of their width, and the elements of the ends, or all where the operands are never
// aligned together, are taken one by one.
#pragma once
#include "cuda/elements.cuh"
#include "cuda/warp.cuh"
#include "stage_rules.h"

namespace fasttrain {
inline namespace FT_ISA {

// A chunk of the table: that of walk.cuh, whose last column is the address of its sums, one `Sums` for each block.
template <class Rule, class T, u8 P, u8 G, u8 S>
struct Stage {
  using Like = Step<Rule, T, P, G, S>;  // the same operands
  using K = typename Rule::K;
  using OfStates = typename Upto<Rule::states>::type;
  using OfSums = typename Upto<Rule::sums>::type;
  static constexpr int states = Rule::states, streams = 2 + states, columns = table_columns(streams), sums = Rule::sums;
  static constexpr int room = Like::room, width = Like::width, some_sums = sums > 0 ? sums : 1;
  static_assert(sums <= 2, "a half of a warp for each");
  static constexpr u32 window = 32 * kTogether * width;                 // elements of a round
  static constexpr u32 apart = window * static_cast<u32>(sizeof(T)) + 64;  // so that the two halves use different banks
  static constexpr u32 shared_bytes_of_warp = sums > 0 ? sums * apart : kAccess;
  HOST_DEVICE static constexpr int bytes_of(int s) { return Like::bytes_of(s); }
  HOST_DEVICE static constexpr bool writes(int state) { return (Rule::changed >> (1 + state) & 1) != 0; }
  static constexpr bool writes_p = (Rule::changed & 1) != 0;
  template <u8 Kept> using PackOf = typename Like::template PackOf<Kept>;

  struct Held {
    PackOf<P> p[kTogether];
    PackOf<G> g[kTogether];
    PackOf<S> s[kTogether][room];
    double sum;
  };

  template <int... I, int... J>
  HOST_DEVICE static void apply(T& p, T g, [[maybe_unused]] T (&s)[room], [[maybe_unused]] T (&terms)[some_sums],
                                const K& k, Indices<I...>, Indices<J...>) {
    Rule::element(p, g, s[I]..., terms[J]..., k);
    ((s[I] = without_denormal(s[I])), ...);
  }

  template <int... I>
  HOST_DEVICE static void one(const Chunk<streams>& chunk, u32 at, T scale, const K& k, T (&terms)[some_sums],
                              Indices<I...>) {
    Bits<storage_bytes(P)> p_bits;
    Bits<storage_bytes(G)> g_bits;
    [[maybe_unused]] Bits<storage_bytes(S)> s_bits[room];
    load_bits(chunk.address(0, at, bytes_of(0)), p_bits);
    load_bits(chunk.address(1, at, bytes_of(1)), g_bits);
    (load_bits(chunk.address(2 + I, at, bytes_of(2)), s_bits[I]), ...);
    [[maybe_unused]] T p = decode<T, P>(p_bits), s[room];
    ((s[I] = decode<T, S>(s_bits[I])), ...);
    apply(p, decode<T, G>(g_bits) * scale, s, terms, k, OfStates(), OfSums());
    if constexpr (writes_p) store_bits(chunk.address(0, at, bytes_of(0)), encode<T, P>(p));
    ((writes(I) ? store_bits(chunk.address(2 + I, at, bytes_of(2)), encode<T, S>(s[I])) : void()), ...);
  }

  // A pack, whose elements have places from `place` on in the window.
  template <int... I>
  HOST_DEVICE static void compute(PackOf<P>& p_pack, const PackOf<G>& g_pack, PackOf<S> (&s_pack)[room], T scale,
                                  const K& k, u32 place, char* shared, Indices<I...>) {
    [[maybe_unused]] T p[width], s[room][width], terms[some_sums][width];
    FT_UNROLL
    for (int e = 0; e < width; ++e) {
      T state[room], term[some_sums];
      p[e] = decode<T, P>(p_pack.get(e));
      ((state[I] = decode<T, S>(s_pack[I].get(e))), ...);
      apply(p[e], decode<T, G>(g_pack.get(e)) * scale, state, term, k, OfStates(), OfSums());
      ((s[I][e] = state[I]), ...);
      FT_UNROLL
      for (int j = 0; j < sums; ++j) terms[j][e] = term[j];
    }
    if constexpr (writes_p) encode_all<P>(p, p_pack);
    ((writes(I) ? encode_all<S>(s[I], s_pack[I]) : void()), ...);
    FT_UNROLL
    for (int j = 0; j < sums; ++j) {
      Pack<sizeof(T), width> pack;
      FT_UNROLL
      for (int e = 0; e < width; ++e) pack.set(e, bit_cast<Bits<sizeof(T)>>(terms[j][e]));
      FT_UNROLL
      for (int i = 0; i < pack.count; ++i)
        share_words(shared + j * apart + place * sizeof(T) + kAccess * i, pack.words[i]);
    }
  }

  // A round in which every access is wide. `at` is the window's first element in the chunk.
  template <int... I>
  HOST_DEVICE static void whole(Held& held, u32 lane, const Chunk<streams>& chunk, u32 at, T scale, const K& k,
                                char* shared, Indices<I...>) {
    FT_UNROLL
    for (u32 u = 0; u < kTogether; ++u) {
      const u32 first = at + (32 * u + lane) * width;
      held.p[u].load(chunk.address(0, first, bytes_of(0)));
      held.g[u].load(chunk.address(1, first, bytes_of(1)));
      (held.s[u][I].load(chunk.address(2 + I, first, bytes_of(2))), ...);
      scale = Like::after(held.p[u], held.g[u], held.s[u], scale, chunk.zero);
    }
    FT_UNROLL
    for (u32 u = 0; u < kTogether; ++u) {
      const u32 place = (32 * u + lane) * width;
      compute(held.p[u], held.g[u], held.s[u], scale, k, place, shared, OfStates());
      if constexpr (writes_p) held.p[u].store(chunk.address(0, at + place, bytes_of(0)));
      ((writes(I) ? held.s[u][I].store(chunk.address(2 + I, at + place, bytes_of(2))) : void()), ...);
    }
  }

  // Elements [begin, end) of the chunk, one by one; `at` is the window's first, or what wraps around to it.
  HOST_DEVICE static void singly(u32 lane, const Chunk<streams>& chunk, u32 at, u32 begin, u32 end, T scale, const K& k,
                                 char* shared) {
    for (u32 place = lane; place < window; place += 32) {
      T terms[some_sums];
      FT_UNROLL
      for (int j = 0; j < some_sums; ++j) terms[j] = 0;
      const u32 element = at + place;
      if (element - begin < end - begin) one(chunk, element, scale, k, terms, OfStates());
      FT_UNROLL
      for (int j = 0; j < sums; ++j)
        share_bits(shared + j * apart + place * sizeof(T), bit_cast<Bits<sizeof(T)>>(terms[j]));
    }
  }

  HOST_DEVICE static void add(Held& held, u32 lane, u32 shift, const char* shared) {
    const u32 sum = lane / kSumLanes;
    if (sum >= sums) return;
    const char* mine = shared + sum * apart + (lane + shift) % kSumLanes * sizeof(T);
    FT_UNROLL
    for (u32 i = 0; i < window / kSumLanes; ++i) {
      Bits<sizeof(T)> bits;
      shared_bits(mine + i * kSumLanes * sizeof(T), bits);
      held.sum += static_cast<double>(bit_cast<T>(bits));
    }
  }

  HOST_DEVICE static void walk(const i64* table, i64 chunks, const T* rows, const i64* gradients, Place place,
                               char* shared) {
    const i64 warps = i64{Warp<Held>::count(place)} * place.blocks;
    int bytes[streams];
    FT_UNROLL
    for (int s = 0; s < streams; ++s) bytes[s] = bytes_of(s);
    for (i64 c = i64{Warp<Held>::count(place)} * place.block + Warp<Held>::number(place); c < chunks; c += warps) {
      const i64* here = table + c * columns;
      const Chunk<streams> chunk(here, gradient_of(gradients, c, here + 1));
      char* to = reinterpret_cast<char*>(here[streams + 2]);
      const T* row = rows + chunk.row * (1 + Rule::coefficients);
      const T scale = row[0];
      const K k(row + 1);
      const u32 head = chunk.head(bytes);
      const bool aligned = head != ~0u;
      const u32 shift = aligned ? (width - head) % width : 0;
      for (u32 begin = 0; begin < chunk.elements; begin += kSumElements) {
        const u32 left = chunk.elements - begin, count = left < kSumElements ? left : kSumElements;
        Warp<Held> warp;
        warp.each([&](Held& held, u32) { held.sum = 0.0; });
        for (u32 first = 0; first < shift + count; first += window) {  // places
          const bool inside = aligned && first >= shift && first + window <= shift + count;
          const u32 at = begin + first - shift;
          if (inside) warp.each([&](Held& held, u32 lane) { whole(held, lane, chunk, at, scale, k, shared, OfStates()); });
          else warp.each([&](Held&, u32 lane) { singly(lane, chunk, at, begin, begin + count, scale, k, shared); });
          if constexpr (sums > 0) {
            warp.barrier();
            warp.each([&](Held& held, u32 lane) { add(held, lane, shift, shared); });
            warp.barrier();
          }
        }
        if constexpr (sums > 0) {
          warp.template add_across<kSumLanes>([](Held& held) -> double& { return held.sum; });
          warp.each([&](Held& held, u32 lane) {
            const u64 bits = bit_cast<u64>(held.sum);
            char* mine = to + begin / kSumElements * sizeof(Sums) + lane / kSumLanes * sizeof(double);
            if (lane % kSumLanes == 0) store_bits(mine, lane / kSumLanes < sums ? bits : 0);
          });
        }
      }
    }
  }
};

}  // namespace FT_ISA
}  // namespace fasttrain

// The combinations that are compiled ahead of time: element type; storage of parameter, gradient and states. States that
// a first stage changes are kept in float32 beside 16-bit parameters, and a second stage may read one for its gradient.
#define FASTTRAIN_STAGE_KERNELS(X)                                                 \
  FT_STAGE_WIDE(X, LAMBMeasure) FT_STAGE_BY_GRADIENT(X, LAMBMeasure)               \
  FT_STAGE_WIDE(X, LAMBApply) FT_STAGE_BY_STATE(X, LAMBApply)                      \
  FT_STAGE_WIDE(X, StableAdamWMeasure) FT_STAGE_BY_GRADIENT(X, StableAdamWMeasure) \
  FT_STAGE_WIDE(X, StableAdamWApply) FT_STAGE_BY_GRADIENT(X, StableAdamWApply)     \
  FT_STAGE_WIDE(X, LARSMeasurePlain) FT_STAGE_ALIKE(X, LARSMeasurePlain)           \
  FT_STAGE_WIDE(X, LARSMeasure) FT_STAGE_ALIKE(X, LARSMeasure)                     \
  FT_STAGE_WIDE(X, LARSPlain) FT_STAGE_ALIKE(X, LARSPlain)                         \
  FT_STAGE_WIDE(X, LARSMomentum) FT_STAGE_ALIKE(X, LARSMomentum)                   \
  FT_STAGE_WIDE(X, LARSNesterov) FT_STAGE_ALIKE(X, LARSNesterov)
#define FT_STAGE_WIDE(X, Rule) X(Rule, float, F32, F32, F32) X(Rule, double, F64, F64, F64)
#define FT_STAGE_BY_GRADIENT(X, Rule) X(Rule, float, BF16, BF16, F32) X(Rule, float, F16, F16, F32)
#define FT_STAGE_BY_STATE(X, Rule) X(Rule, float, BF16, F32, F32) X(Rule, float, F16, F32, F32)
#define FT_STAGE_ALIKE(X, Rule) X(Rule, float, BF16, BF16, BF16) X(Rule, float, F16, F16, F16)

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FT_STAGE_KERNEL(Rule, T, P, G, S)                                                                 \
  extern "C" __global__ void __launch_bounds__(fasttrain::kThreads, sizeof(T) == 8 ? 1 : 2)               \
  stage_##Rule##_##P##_##G##_##S(const fasttrain::i64* table, fasttrain::i64 chunks, const T* rows,       \
                              const fasttrain::i64* gradients) {                                          \
    using namespace fasttrain;                                                                            \
    using Kernel = Stage<Rule<T>, T, k##P, k##G, k##S>;                                                   \
    __shared__ alignas(16) char shared[kThreads / 32 * Kernel::shared_bytes_of_warp];                     \
    const Place place{threadIdx.x, blockDim.x, blockIdx.x, gridDim.x};                                    \
    char* own = shared + threadIdx.x / 32 * Kernel::shared_bytes_of_warp;                                 \
    Kernel::walk(table, chunks, rows, gradients, place, own);                                             \
  }
#ifndef FT_ON_DEMAND
FASTTRAIN_STAGE_KERNELS(FT_STAGE_KERNEL)
#endif
#endif
