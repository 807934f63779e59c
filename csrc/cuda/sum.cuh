// The chunks of all ranks added in their order, scaled and rounded, and if asked for the sum of squares of what is stored
// and whether any of it is infinite or NaN, by the order of cpu/lanes.h (fasttrain/kernels/chunks.py).
//
// A warp takes stretches of 4,096 elements, the blocks of that order, and shorter ones where nothing is measured. What it
// stores goes through shared memory to the lanes that it belongs to, as in norm.cuh. Places in a stretch are counted
// as in stages.cuh: packs lie at multiples of their width, the elements of the ends are taken one by one, or all of them
// where the operands are never aligned together.
#pragma once
#include "cuda/kept.cuh"
#include "cuda/norm.cuh"
#include "cuda/pack.cuh"
#include "cuda/warp.cuh"

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FT_ROLLED _Pragma("unroll 1")
#else
#define FT_ROLLED
#endif

namespace fasttrain {
inline namespace FT_ISA {

// The neighbours that a lane loads of one rank's chunk, at most 16 codes of one block.
template <u8 From, int Width>
struct Share {
  Pack<storage_bytes(From), Width> pack;
  HOST_DEVICE void load(const char* main, const char*, i64 at) { pack.load(main + at * storage_bytes(From)); }
  template <class T> HOST_DEVICE T get(int e) const { return decode<T, From>(pack.get(e)); }
  HOST_DEVICE u32 any() const { return pack.any(); }
};
template <int Width>
struct Share<kInt8, Width> {
  static_assert(Width == kAccess, "one access");
  Words words;
  u32 unit;
  HOST_DEVICE void load(const char* main, const char* units, i64 at) {
    words = load_words(main + at);
    load_bits(units + at / kTile * 4, unit);
  }
  template <class T> HOST_DEVICE T get(int e) const {
    return square_value(words.word[e / 4] ^ 0x80808080u, e % 4) * float_of(unit);
  }
  HOST_DEVICE u32 any() const { return words.word[0] | unit; }
};

// The table: (address of the result, its elements); (the bits of the scale as a double, the address of one `Sums` for each
// block of 4,096 elements or zero); then for each rank (address of its chunk, of its units). The result may be a chunk.
template <u8 From, u8 To>
struct SumOf {
  static constexpr int columns = 2, headers = 2;
  static constexpr bool coded = From == kInt8;
  using T = typename Computed<From == kF64 || To == kF64>::type;
  static constexpr int from_bytes = coded ? 1 : storage_bytes(From), to_bytes = storage_bytes(To);
  static constexpr int width = kAccess / (from_bytes < to_bytes ? from_bytes : to_bytes);
  static constexpr int together = coded ? 1 : 2;         // packs of a lane in a round,
  static constexpr int ranks_together = coded ? 4 : 2;   // of so many ranks before the first is added
  static constexpr u32 window = 32 * together * width;   // elements of a round
  static constexpr u32 shared_bytes_of_warp = window * to_bytes;

  struct Held {
    double sum;
    u32 bad;
  };

  struct Call {
    char* out;
    char* sums;
    i64 elements, ranks;
    const i64* chunks;
    T scale;
    u32 zero;  // as in walk.cuh
    bool aligned;
    u32 shift;  // of places: from the last aligned element at or before a stretch to its first

    HOST_DEVICE Call(const i64* table, i64 rows)
        : out(reinterpret_cast<char*>(table[0])), sums(reinterpret_cast<char*>(table[3])), elements(table[1]),
          ranks(rows - headers), chunks(table + headers * columns), scale(static_cast<T>(bit_cast<double>(table[2]))),
          zero(static_cast<u32>(static_cast<u64>(table[1]) >> 63)) {
      const u32 narrowest = low(from_bytes <= to_bytes ? chunks[0] : table[0]);
      const u32 head = (0 - narrowest) % kAccess / static_cast<u32>(kAccess / width);
      u32 past = low(table[0]) + head * to_bytes;
      FT_ROLLED
      for (i64 r = 0; r < ranks; ++r) past |= low(chunks[r * columns]) + head * from_bytes;
      aligned = past % kAccess == 0 && !(coded && head != 0);
      shift = aligned ? (width - head) % width : 0;
    }
    HOST_DEVICE static u32 low(i64 address) { return static_cast<u32>(address); }
    HOST_DEVICE const char* main(i64 rank) const { return reinterpret_cast<const char*>(chunks[rank * columns]); }
    HOST_DEVICE const char* units(i64 rank) const { return reinterpret_cast<const char*>(chunks[rank * columns + 1]); }
  };

  // Adds whole groups of so many ranks, then what is left in smaller ones.
  template <int Ranks>
  HOST_DEVICE static void add_ranks(T (&total)[together][width], const Call& call, i64 rank, i64 at) {
    FT_ROLLED  // else ptxas takes all of the registers
    for (; rank + Ranks <= call.ranks; rank += Ranks) {
      Share<From, width> share[Ranks][together];
      u32 arrived = 0;
      FT_UNROLL
      for (int r = 0; r < Ranks; ++r)
        FT_UNROLL
        for (int u = 0; u < together; ++u) {
          share[r][u].load(call.main(rank + r), call.units(rank + r), at + 32 * width * u);
          arrived |= share[r][u].any();
        }
      // Minus zero, which changes nothing, but known only when everything has arrived: ptxas moves a load down to its
      // first use.
      const T nothing = bit_cast<T>(bit_cast<Bits<sizeof(T)>>(T{-0.0f}) | (arrived & call.zero));
      FT_UNROLL
      for (int u = 0; u < together; ++u)
        FT_UNROLL
        for (int e = 0; e < width; ++e) {
          if (u + e == 0) total[u][e] = total[u][e] + nothing;
          FT_UNROLL
          for (int r = 0; r < Ranks; ++r) total[u][e] = total[u][e] + share[r][u].template get<T>(e);
        }
    }
    if constexpr (Ranks > 1) add_ranks<Ranks / 2>(total, call, rank, at);
  }

  // A round in which every access is wide; the lane's first pack begins at element `at`.
  HOST_DEVICE static void whole(Held& held, u32 lane, const Call& call, i64 window_at, char* shared) {
    const i64 at = window_at + lane * width;
    T total[together][width];
    FT_UNROLL
    for (int u = 0; u < together; ++u)
      FT_UNROLL
      for (int e = 0; e < width; ++e) total[u][e] = T{-0.0f};  // to which anything is added unchanged
    add_ranks<ranks_together>(total, call, 0, at);
    FT_UNROLL
    for (int u = 0; u < together; ++u) {
      FT_UNROLL
      for (int e = 0; e < width; ++e) total[u][e] = total[u][e] * call.scale;
      Pack<to_bytes, width> pack;
      encode_all<To>(total[u], pack);
      pack.store(call.out + (at + 32 * width * u) * to_bytes);
      if (call.sums == nullptr) continue;
      FT_UNROLL
      for (int i = 0; i < pack.count; ++i) {
        held.bad |= Squares<To>::not_finite(pack.words[i]);
        share_words(shared + (lane + 32 * u) * width * to_bytes + kAccess * i, pack.words[i]);
      }
    }
  }

  // The elements of the window that are in [begin, end), one by one.
  HOST_DEVICE static void singly(Held& held, u32 lane, const Call& call, i64 window_at, i64 begin, i64 end, char* shared) {
    FT_ROLLED
    for (u32 place = lane; place < window; place += 32) {
      const i64 at = window_at + place;
      Bits<to_bytes> sent = 0;
      if (at >= begin && at < end) {
        T total = T{-0.0f};
        FT_ROLLED
        for (i64 r = 0; r < call.ranks; ++r) total = total + number(call, r, at);
        sent = encode<T, To>(total * call.scale);
        store_bits(call.out + at * to_bytes, sent);
      }
      if (call.sums == nullptr) continue;
      Words words{};
      join<to_bytes>(words, 0, sent);
      held.bad |= Squares<To>::not_finite(words);
      share_bits(shared + place * to_bytes, sent);
    }
  }
  HOST_DEVICE static T number(const Call& call, i64 rank, i64 at) {
    Bits<from_bytes> bits;
    load_bits(call.main(rank) + at * from_bytes, bits);
    if constexpr (coded) {
      u32 unit;
      load_bits(call.units(rank) + at / kTile * 4, unit);
      return square_value(bits ^ 0x80u, 0) * float_of(unit);
    } else {
      return decode<T, From>(bits);
    }
  }

  HOST_DEVICE static void add(Held& held, u32 lane, u32 shift, const char* shared) {
    if (lane >= kSumLanes) return;
    const char* mine = shared + (lane + shift) % kSumLanes * to_bytes;
    FT_UNROLL
    for (u32 i = 0; i < window / kSumLanes; ++i) {
      Bits<to_bytes> bits;
      shared_bits(mine + i * kSumLanes * to_bytes, bits);
      const double x = decode<double, To>(bits);
      if constexpr (To == kF64) held.sum = held.sum + x * x;
      else held.sum = add_exact_square(held.sum, x);
    }
  }

  HOST_DEVICE static void walk(const i64* table, i64 rows, const void*, Place place, char* shared) {
    const Call call(table, rows);
    const i64 warps = i64{Warp<Held>::count(place)} * place.blocks;
    const bool measured = call.sums != nullptr;
    const i64 stretch = measured || call.shift != 0 ? i64{kSumElements} : i64{window};
    for (i64 b = i64{Warp<Held>::count(place)} * place.block + Warp<Held>::number(place); b * stretch < call.elements;
         b += warps) {
      const i64 begin = b * stretch, left = call.elements - begin, end = left < stretch ? call.elements : begin + stretch;
      Warp<Held> warp;
      warp.each([&](Held& held, u32) { held.sum = 0.0, held.bad = 0; });
      for (i64 at = begin - call.shift; at < end; at += window) {
        const bool inside = call.aligned && at >= begin && at + window <= end;
        if (inside) warp.each([&](Held& held, u32 lane) { whole(held, lane, call, at, shared); });
        else warp.each([&](Held& held, u32 lane) { singly(held, lane, call, at, begin, end, shared); });
        if (!measured) continue;
        warp.barrier();
        warp.each([&](Held& held, u32 lane) { add(held, lane, call.shift, shared); });
        warp.barrier();
      }
      if (!measured) continue;
      warp.template add_across<kSumLanes>([](Held& held) -> double& { return held.sum; });
      const bool bad = warp.any([](Held& held) { return held.bad != 0; });
      warp.each([&](Held& held, u32 lane) {
        if (lane == 0) store_sums(call.sums + b * static_cast<i64>(sizeof(Sums)), held.sum, bad ? 1.0 : 0.0);
      });
    }
  }
};

}  // namespace FT_ISA
}  // namespace fasttrain

// The combinations that are compiled ahead of time: storages of the chunks and of the result.
#define FASTTRAIN_SUMS(X)                                                        \
  X(F32, F32) X(F32, BF16) X(F32, F16) X(BF16, F32) X(BF16, BF16) X(F16, F32)    \
  X(F16, F16) X(F64, F64) X(INT8, F32) X(INT8, BF16) X(INT8, F16)

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FT_SUM_KERNEL(From, To)                                                                           \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                    \
  sum_##From##_##To(const fasttrain::i64* table, fasttrain::i64 rows, const void* none) {                 \
    using namespace fasttrain;                                                                            \
    using Kernel = SumOf<codes::From, codes::To>;                                                         \
    __shared__ alignas(16) char shared[kThreads / 32 * Kernel::shared_bytes_of_warp];                     \
    const Place place{threadIdx.x, blockDim.x, blockIdx.x, gridDim.x};                                    \
    Kernel::walk(table, rows, none, place, shared + threadIdx.x / 32 * Kernel::shared_bytes_of_warp);     \
  }
#ifndef FT_ON_DEMAND
FASTTRAIN_SUMS(FT_SUM_KERNEL)
#endif
#endif
