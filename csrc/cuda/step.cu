// The CUDA step: one kernel for each rule and combination of storages. Read alike by nvcc and NVRTC, and by g++ for
// host_walk.cpp, so that only our own headers are included. Must be compiled with -fmad=false, IEEE division and root,
// and denormals kept: the bits are those of cpu/step.cpp.
#include "cuda/elements.cuh"
#include "rules.h"

namespace fasttrain {
inline namespace FT_ISA {

constexpr int kThreads = 256;  // of one block
constexpr int kTogether = 2;   // packs that a thread loads before it computes on the first

// A rule whose parameter is kept as P, gradient as G, and states as S, computed in T.
template <class Rule, class T, u8 P, u8 G, u8 S>
struct Step {
  static constexpr int states = Rule::states, streams = 2 + states, columns = table_columns(streams);
  static constexpr int room = states > 0 ? states : 1;  // there are no empty arrays
  using K = typename Rule::K;
  using States = typename Upto<states>::type;

  HOST_DEVICE static constexpr int bytes_of(int s) { return storage_bytes(s == 0 ? P : s == 1 ? G : S); }
  HOST_DEVICE static constexpr int narrowest() {
    int least = bytes_of(0) < bytes_of(1) ? bytes_of(0) : bytes_of(1);
    return states > 0 && bytes_of(2) < least ? bytes_of(2) : least;
  }
  static constexpr int width = kAccess / narrowest();  // elements of a pack: at least one access for every operand
  template <u8 Kept> using PackOf = Pack<storage_bytes(Kept), width>;

  template <int... I>
  HOST_DEVICE static void apply(T& p, T g, [[maybe_unused]] T (&s)[room], const K& k, Indices<I...>) {
    Rule::element(p, g, s[I]..., k);
    ((s[I] = without_denormal(s[I])), ...);
  }

  HOST_DEVICE static void one(const Chunk<streams>& chunk, u32 at, T scale, const K& k) {
    Bits<storage_bytes(P)> p_bits;
    Bits<storage_bytes(G)> g_bits;
    Bits<storage_bytes(S)> s_bits[room];
    load_bits(chunk.address(0, at, bytes_of(0)), p_bits);
    load_bits(chunk.address(1, at, bytes_of(1)), g_bits);
    FT_UNROLL
    for (int i = 0; i < states; ++i) load_bits(chunk.address(2 + i, at, bytes_of(2)), s_bits[i]);
    T p = decode<T, P>(p_bits), s[room];
    FT_UNROLL
    for (int i = 0; i < states; ++i) s[i] = decode<T, S>(s_bits[i]);
    apply(p, decode<T, G>(g_bits) * scale, s, k, States());
    store_bits(chunk.address(0, at, bytes_of(0)), encode<T, P>(p));
    FT_UNROLL
    for (int i = 0; i < states; ++i) store_bits(chunk.address(2 + i, at, bytes_of(2)), encode<T, S>(s[i]));
  }

  HOST_DEVICE static void compute(PackOf<P>& p_pack, const PackOf<G>& g_pack, PackOf<S> (&s_pack)[room], T scale,
                                  const K& k) {
    T p[width], s[room][width];
    FT_UNROLL
    for (int e = 0; e < width; ++e) {
      T state[room];
      p[e] = decode<T, P>(p_pack.get(e));
      FT_UNROLL
      for (int i = 0; i < states; ++i) state[i] = decode<T, S>(s_pack[i].get(e));
      apply(p[e], decode<T, G>(g_pack.get(e)) * scale, state, k, States());
      FT_UNROLL
      for (int i = 0; i < states; ++i) s[i][e] = state[i];
    }
    encode_all<P>(p, p_pack);
    FT_UNROLL
    for (int i = 0; i < states; ++i) encode_all<S>(s[i], s_pack[i]);
  }

  // `scale`, unchanged, but known only when all packs have arrived: ptxas moves a load down to its first use, which
  // would leave half as many in flight. `zero` is a zero of which the compiler does not know.
  HOST_DEVICE static T after(const PackOf<P>& p, const PackOf<G>& g, const PackOf<S> (&s)[room], T scale, u32 zero) {
    u32 any = p.any() | g.any();
    FT_UNROLL
    for (int i = 0; i < states; ++i) any |= s[i].any();
    return bit_cast<T>(bit_cast<Bits<sizeof(T)>>(scale) | (any & zero));
  }

  HOST_DEVICE static void walk(const i64* table, i64 chunks, const T* rows, const i64* gradients, Place place) {
    int bytes[streams];
    FT_UNROLL
    for (int s = 0; s < streams; ++s) bytes[s] = bytes_of(s);
    for (i64 c = place.block; c < chunks; c += place.blocks) {
      const i64* here = table + c * columns;
      const Chunk<streams> chunk(here, gradient_of(gradients, c, here + 1));
      const T* row = rows + chunk.row * (1 + Rule::coefficients);
      const T scale = row[0];
      const K k(row + 1);

      const u32 skip = chunk.head(bytes);
      const u32 packs = skip < chunk.elements ? (chunk.elements - skip) / width : 0;
      const u32 head = packs > 0 ? skip : 0;
      for (u32 first = place.thread; first < packs; first += kTogether * place.threads) {
        PackOf<P> p[kTogether];
        PackOf<G> g[kTogether];
        PackOf<S> s[kTogether][room];
        T last_scale = scale;
        FT_UNROLL
        for (int u = 0; u < kTogether; ++u) {
          const u32 pack = first + u * place.threads;
          const u32 at = head + (pack < packs ? pack : first) * width;  // past the end: the first again, then dropped
          p[u].load(chunk.address(0, at, bytes_of(0)));
          g[u].load(chunk.address(1, at, bytes_of(1)));
          FT_UNROLL
          for (int i = 0; i < states; ++i) s[u][i].load(chunk.address(2 + i, at, bytes_of(2)));
          last_scale = after(p[u], g[u], s[u], last_scale, chunk.zero);
        }
        FT_UNROLL
        for (int u = 0; u < kTogether; ++u) {
          compute(p[u], g[u], s[u], last_scale, k);
          const u32 pack = first + u * place.threads;
          if (u == 0 || pack < packs) {
            const u32 at = head + pack * width;
            p[u].store(chunk.address(0, at, bytes_of(0)));
            FT_UNROLL
            for (int i = 0; i < states; ++i) s[u][i].store(chunk.address(2 + i, at, bytes_of(2)));
          }
        }
      }
      // What no pack holds: the head and the tail, or all of a chunk whose operands are never aligned together.
      const u32 packed = packs * width, singles = chunk.elements - packed;
      for (u32 i = place.thread; i < singles; i += place.threads) one(chunk, i < head ? i : packed + i, scale, k);
    }
  }
};

}  // namespace FT_ISA
}  // namespace fasttrain

// The combinations that are compiled ahead of time: element type; storage of parameter, gradient and states.
#define FASTTRAIN_PLAIN(X, Rule) \
  X(Rule, float, F32, F32, F32)  \
  X(Rule, double, F64, F64, F64)
#define FASTTRAIN_MIXED(X, Rule)   \
  X(Rule, float, BF16, BF16, BF16) \
  X(Rule, float, F16, F16, F16)    \
  X(Rule, float, BF16, F32, BF16)  \
  X(Rule, float, F16, F32, F16)    \
  X(Rule, float, BF16, BF16, F32)

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
// In fp64 the second bound, one block, lets it take the registers that it needs: without it some kernels spill.
#define FT_STEP_KERNEL(Name, Blocks, Rule, T, P, G, S)                                                    \
  extern "C" __global__ void __launch_bounds__(fasttrain::kThreads, Blocks)                               \
  Name(const fasttrain::i64* table, fasttrain::i64 chunks, const T* rows,                                 \
       const fasttrain::i64* gradients) {                                                                 \
    using namespace fasttrain;                                                                            \
    const Place place{threadIdx.x, blockDim.x, blockIdx.x, gridDim.x};                                    \
    Step<Rule<T>, T, k##P, k##G, k##S>::walk(table, chunks, rows, gradients, place);                      \
  }
#define FT_KERNEL(Rule, T, P, G, S) FT_STEP_KERNEL(step_##Rule##_##P##_##G##_##S, sizeof(T) == 8, Rule, T, P, G, S)
#define FT_PLAIN_KERNELS(Rule) FASTTRAIN_PLAIN(FT_KERNEL, Rule)
#define FT_ALL_KERNELS(Rule) FASTTRAIN_PLAIN(FT_KERNEL, Rule) FASTTRAIN_MIXED(FT_KERNEL, Rule)
#ifndef FT_ON_DEMAND  // compiled at run time for one kernel (fasttrain/kernels/emit_cuda.py), which follows this text
FASTTRAIN_COMMON_RULES(FT_ALL_KERNELS)
FASTTRAIN_OTHER_RULES(FT_PLAIN_KERNELS)
#endif
#endif

#include "cuda/kept.cuh"
#include "cuda/factored.cuh"
#include "cuda/norm.cuh"
#include "cuda/pack.cuh"
#include "cuda/encode.cuh"
#include "cuda/sum.cuh"
#include "cuda/stages.cuh"
#include "cuda/tree.cuh"
#include "cuda/driven.cuh"
