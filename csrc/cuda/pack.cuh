// Buckets: many flat tensors from one plain storage to another in one launch, scaled, and with what a rounding lost
// carried over to the next time (fasttrain/kernels/pack.py). The same bits as cpu/pack.cpp.
#pragma once
#include "cuda/elements.cuh"

namespace fasttrain {
inline namespace FT_ISA {

constexpr u8 kNone = kStorages;  // in the place of a residual's storage

template <bool Wide> struct Computed { using type = float; };
template <> struct Computed<true> { using type = double; };

template <class T> HOST_DEVICE bool bounded(T x) {  // neither infinite nor NaN
  return absolute(x) <= (sizeof(T) == 8 ? static_cast<T>(0x1.fffffffffffffp1023) : static_cast<T>(0x1.fffffep127));
}

// What the rounding of `meant` to `sent` took away; nothing is owed for what is not finite.
template <class T> HOST_DEVICE T left_of(T meant, T sent) { return bounded(sent) ? meant - sent : T{0}; }

// A row of the table: addresses of source, target and residual, if there is one; elements; the bits of the scale as a
// double; and 1 if the source's address is counted from the kernel's third argument. So a table that stays on the device
// packs one slot whatever the tensor. Source and target may be the same elements.
template <u8 From, u8 To, u8 Lost>
struct MoveOf {
  static constexpr bool feedback = Lost != kNone;
  static constexpr int streams = feedback ? 3 : 2, columns = table_columns(streams);
  using T = typename Computed<From == kF64 || To == kF64>::type;

  HOST_DEVICE static constexpr int bytes_of(int s) { return storage_bytes(s == 0 ? From : s == 1 ? To : Lost); }
  HOST_DEVICE static constexpr int narrowest() {
    const int least = bytes_of(0) < bytes_of(1) ? bytes_of(0) : bytes_of(1);
    return feedback && bytes_of(2) < least ? bytes_of(2) : least;
  }
  static constexpr int width = kAccess / narrowest();
  static constexpr int loads = (bytes_of(0) + (feedback ? bytes_of(2) : 0)) * width / kAccess;  // of a pack
  static constexpr int together = loads == 1 ? 4 : 2;  // packs that a thread loads before it computes on the first
  using FromPack = Pack<storage_bytes(From), width>;
  using ToPack = Pack<storage_bytes(To), width>;
  using LostPack = Pack<storage_bytes(feedback ? Lost : To), width>;  // unused where there is none

  HOST_DEVICE static void one(const Chunk<streams>& chunk, u32 at, T scale) {
    Bits<storage_bytes(From)> bits;
    [[maybe_unused]] Bits<storage_bytes(Lost)> owed;
    load_bits(chunk.address(0, at, bytes_of(0)), bits);
    if constexpr (feedback) load_bits(chunk.address(2, at, bytes_of(2)), owed);
    T x = decode<T, From>(bits) * scale;
    if constexpr (feedback) x = x + decode<T, Lost>(owed);
    const Bits<storage_bytes(To)> sent = encode<T, To>(x);
    store_bits(chunk.address(1, at, bytes_of(1)), sent);
    if constexpr (feedback)
      store_bits(chunk.address(2, at, bytes_of(2)), encode<T, Lost>(left_of(x, decode<T, To>(sent))));
  }

  HOST_DEVICE static void compute(const FromPack& from, ToPack& to, [[maybe_unused]] LostPack& lost, T scale) {
    T x[width];
    FT_UNROLL
    for (int e = 0; e < width; ++e) {
      x[e] = decode<T, From>(from.get(e)) * scale;
      if constexpr (feedback) x[e] = x[e] + decode<T, Lost>(lost.get(e));
    }
    encode_all<To>(x, to);
    if constexpr (feedback) {
      FT_UNROLL
      for (int e = 0; e < width; ++e) x[e] = left_of(x[e], decode<T, To>(to.get(e)));
      encode_all<Lost>(x, lost);
    }
  }

  HOST_DEVICE static void walk(const i64* table, i64 chunks, const char* base, Place place) {
    int bytes[streams];
    FT_UNROLL
    for (int s = 0; s < streams; ++s) bytes[s] = bytes_of(s);
    for (i64 c = place.block; c < chunks; c += place.blocks) {
      const i64* row = table + c * columns;
      Chunk<streams> chunk(row, row + 1);
      if (row[streams + 2] != 0) chunk.at[0] += reinterpret_cast<u64>(base);
      const T scale = static_cast<T>(bit_cast<double>(chunk.row));

      const u32 skip = chunk.head(bytes);
      const u32 packs = skip < chunk.elements ? (chunk.elements - skip) / width : 0;
      const u32 head = packs > 0 ? skip : 0;
      for (u32 first = place.thread; first < packs; first += together * place.threads) {
        FromPack from[together];
        ToPack to;
        LostPack lost[together];
        u32 arrived = 0;
        FT_UNROLL
        for (int u = 0; u < together; ++u) {
          const u32 pack = first + u * place.threads;
          const u32 at = head + (pack < packs ? pack : first) * width;  // past the end: the first again, then dropped
          from[u].load(chunk.address(0, at, bytes_of(0)));
          arrived |= from[u].any();
          if constexpr (feedback) {
            lost[u].load(chunk.address(2, at, bytes_of(2)));
            arrived |= lost[u].any();
          }
        }
        // Unchanged, but known only when everything has arrived: ptxas moves a load down to its first use.
        const T last_scale = bit_cast<T>(bit_cast<Bits<sizeof(T)>>(scale) | (arrived & chunk.zero));
        FT_UNROLL
        for (int u = 0; u < together; ++u) {
          const u32 pack = first + u * place.threads;
          if (u > 0 && pack >= packs) break;
          const u32 at = head + pack * width;
          compute(from[u], to, lost[u], last_scale);
          to.store(chunk.address(1, at, bytes_of(1)));
          if constexpr (feedback) lost[u].store(chunk.address(2, at, bytes_of(2)));
        }
      }
      const u32 packed = packs * width, singles = chunk.elements - packed;
      for (u32 i = place.thread; i < singles; i += place.threads) one(chunk, i < head ? i : packed + i, scale);
    }
  }
};

}  // namespace FT_ISA
}  // namespace fasttrain

// The combinations that are compiled ahead of time: storages of source and target; and with a residual, its own.
#define FASTTRAIN_MOVES(X)                                   \
  X(F32, F32) X(F32, BF16) X(F32, F16) X(F32, F64)           \
  X(BF16, F32) X(BF16, BF16) X(BF16, F16)                    \
  X(F16, F32) X(F16, BF16) X(F16, F16) X(F64, F32) X(F64, F64)
#define FASTTRAIN_FEEDBACKS(X) X(F32, BF16, F32) X(F32, F16, F32) X(BF16, BF16, F32) X(F16, F16, F32)

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FT_MOVING_KERNEL(Name, From, To, Lost)                                                            \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                    \
  Name(const fasttrain::i64* table, fasttrain::i64 chunks, const char* base) {                            \
    using namespace fasttrain;                                                                            \
    const Place place{threadIdx.x, blockDim.x, blockIdx.x, gridDim.x};                                    \
    MoveOf<k##From, k##To, Lost>::walk(table, chunks, base, place);                                       \
  }
#define FT_MOVE_KERNEL(From, To) FT_MOVING_KERNEL(move_##From##_##To, From, To, kNone)
#define FT_FEEDBACK_KERNEL(From, To, Lost) FT_MOVING_KERNEL(move_##From##_##To##_##Lost, From, To, k##Lost)
#ifndef FT_ON_DEMAND
FASTTRAIN_MOVES(FT_MOVE_KERNEL)
FASTTRAIN_FEEDBACKS(FT_FEEDBACK_KERNEL)
#endif
#endif
