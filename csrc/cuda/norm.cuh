// Pass A: sums of squares of gradients in double, and whether an element is infinite or NaN, by the order of
// cpu/lanes.h: the same bits as on a processor.
//
// A warp sums two neighbouring blocks of 4,096 elements at a time, each with one of its halves, lane by lane: sums are
// sequential within a lane, so that no thread may take more than one. What is read 16 bytes at a time goes through shared
// memory to the lanes that its elements belong to. A block lies there as in memory, from the last multiple of 16 bytes
// before it on: where a tensor begins is no matter, and only the words at its ends are read element by element.
#pragma once
#include "cuda/elements.cuh"
#include "cuda/warp.cuh"

namespace fasttrain {
inline namespace FT_ISA {

#if defined(__CUDA_ARCH__)
__device__ __forceinline__ double add_exact_square(double sum, double x) { return __fma_rn(x, x, sum); }
#else
HOST_DEVICE double add_exact_square(double sum, double x) { return sum + x * x; }
#endif

// A chunk of the table: address, elements, and the address of its sums, one `Sums` for each two blocks: the sum of
// squares, and 1 if an element is not finite, else 0.
template <u8 S>
struct Squares {
  static constexpr int columns = 3, bytes = storage_bytes(S), each = kAccess / bytes;
  static constexpr u32 together = 2;                         // accesses of a lane in a round, for either block
  static constexpr u32 window = 32 * together * kAccess;     // bytes of a block that are read in a round
  static constexpr u32 apart = window + 64;                  // so that the two halves use different banks
  static constexpr u32 per_lane = window / bytes / kSumLanes;
  static constexpr u32 shared_bytes_of_warp = 2 * apart;

  struct Held {
    Words words[2][together];
    double sum;
    u32 bad;
  };

  // A pair of blocks. Bytes are counted from the last multiple of 16 before a block.
  struct Blocks {
    const char* at[2];
    u32 begin, end[2];
  };

  HOST_DEVICE static Words load_inside(const Blocks& blocks, u32 half, u32 byte) {
    if (byte >= blocks.begin && byte + kAccess <= blocks.end[half]) return load_words(blocks.at[half] + byte);
    Words words{};
    FT_UNROLL
    for (int e = 0; e < each; ++e) {
      Bits<bytes> bits = 0;
      const u32 at = byte + static_cast<u32>(e * bytes);
      if (at >= blocks.begin && at < blocks.end[half]) load_bits(blocks.at[half] + at, bits);
      join<bytes>(words, e, bits);
    }
    return words;
  }

  HOST_DEVICE static void load(Held& held, u32 lane, const Blocks& blocks, u32 first) {
    const bool whole = first >= blocks.begin && first + window <= blocks.end[0] && first + window <= blocks.end[1];
    if (whole) {
      FT_UNROLL
      for (u32 half = 0; half < 2; ++half)
        FT_UNROLL
        for (u32 u = 0; u < together; ++u)
          held.words[half][u] = load_words(blocks.at[half] + first + (32 * u + lane) * kAccess);
    } else {
      FT_UNROLL
      for (u32 half = 0; half < 2; ++half)
        FT_UNROLL
        for (u32 u = 0; u < together; ++u)
          held.words[half][u] = load_inside(blocks, half, first + (32 * u + lane) * kAccess);
    }
  }

  // Added to the bits of a number without its sign, one carries into the sign where the exponent is all ones.
  HOST_DEVICE static u32 not_finite(const Words& w) {
    u32 carried = 0;
    FT_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (S == kF32) carried |= (w.word[i] & 0x7FFFFFFFu) + 0x00800000u;
      else if constexpr (S == kF64) carried |= i % 2 == 0 ? 0 : (w.word[i] & 0x7FFFFFFFu) + 0x00100000u;
      else carried |= (w.word[i] & 0x7FFF7FFFu) + (S == kBF16 ? 0x00800080u : 0x04000400u);
    }
    return carried & (bytes == 2 ? 0x80008000u : 0x80000000u);
  }

  HOST_DEVICE static void share(Held& held, u32 lane, char* shared) {
    FT_UNROLL
    for (u32 half = 0; half < 2; ++half)
      FT_UNROLL
      for (u32 u = 0; u < together; ++u) {
        held.bad |= not_finite(held.words[half][u]);
        share_words(shared + half * apart + (32 * u + lane) * kAccess, held.words[half][u]);
      }
  }

  HOST_DEVICE static void add(Held& held, u32 lane, const Blocks& blocks, const char* shared) {
    const u32 first = (lane % kSumLanes * bytes + blocks.begin) % (kSumLanes * bytes);
    const char* mine = shared + lane / kSumLanes * apart + first;
    FT_UNROLL
    for (u32 i = 0; i < per_lane; ++i) {
      Bits<bytes> bits;
      shared_bits(mine + i * kSumLanes * bytes, bits);
      const double x = decode<double, S>(bits);
      if constexpr (S == kF64) held.sum = held.sum + x * x;
      else held.sum = add_exact_square(held.sum, x);  // of at most 24 bits: one rounding, contracted or not
    }
  }

  HOST_DEVICE static void pair(const char* at, u32 elements, char* sums, char* shared) {
    const u32 begin = static_cast<u32>(reinterpret_cast<u64>(at)) % kAccess;
    const u32 one = elements < kSumElements ? elements : kSumElements;
    const Blocks blocks{{at - begin, at - begin + kSumElements * bytes}, begin,
                        {begin + one * bytes, begin + (elements - one) * bytes}};
    Warp<Held> warp;
    warp.each([&](Held& held, u32 lane) {
      held.sum = 0.0, held.bad = 0;
      load(held, lane, blocks, 0);
    });
    for (u32 first = 0; first < blocks.end[0]; first += window) {
      warp.each([&](Held& held, u32 lane) { share(held, lane, shared); });
      warp.barrier();
      if (first + window < blocks.end[0])
        warp.each([&](Held& held, u32 lane) { load(held, lane, blocks, first + window); });
      warp.each([&](Held& held, u32 lane) { add(held, lane, blocks, shared); });
      warp.barrier();
    }
    warp.template add_across<32>([](Held& held) -> double& { return held.sum; });
    const bool bad = warp.any([](Held& held) { return held.bad != 0; });
    warp.each([&](Held& held, u32 lane) {
      if (lane == 0) store_sums(sums, held.sum, bad ? 1.0 : 0.0);
    });
  }

  HOST_DEVICE static void walk(const i64* table, i64 chunks, const void*, const i64* gradients, Place place,
                               char* shared) {
    const i64 warps = i64{Warp<Held>::count(place)} * place.blocks;
    for (i64 c = i64{Warp<Held>::count(place)} * place.block + Warp<Held>::number(place); c < chunks; c += warps) {
      const i64* chunk = table + c * columns;
      const char* at = reinterpret_cast<const char*>(*gradient_of(gradients, c, chunk));
      char* sums = reinterpret_cast<char*>(chunk[2]);
      for (i64 left = chunk[1]; left > 0; left -= 2 * kSumElements) {
        pair(at, static_cast<u32>(left < 2 * kSumElements ? left : 2 * kSumElements), sums, shared);
        at += 2 * kSumElements * bytes;
        sums += sizeof(Sums);
      }
    }
  }
};

}  // namespace FT_ISA
}  // namespace fasttrain

#define FASTTRAIN_SQUARES(X) X(F32) X(F64) X(BF16) X(F16)

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#if defined(__CUDACC_RTC__)
#define FT_SQUARES_BLOCKS 2  // NVRTC orders the code otherwise than nvcc does, and would spill at 64 registers
#else
#define FT_SQUARES_BLOCKS 4
#endif
#define FT_SQUARES_KERNEL(S)                                                                              \
  extern "C" __global__ void __launch_bounds__(256, FT_SQUARES_BLOCKS)                                    \
  squares_##S(const fasttrain::i64* table, fasttrain::i64 chunks, const void* none,                       \
              const fasttrain::i64* gradients) {                                                          \
    using namespace fasttrain;                                                                            \
    constexpr u32 room = Squares<k##S>::shared_bytes_of_warp;                                             \
    __shared__ alignas(16) char shared[kThreads / 32 * room];                                             \
    const Place place{threadIdx.x, blockDim.x, blockIdx.x, gridDim.x};                                    \
    Squares<k##S>::walk(table, chunks, none, gradients, place, shared + threadIdx.x / 32 * room);         \
  }
#ifndef FT_ON_DEMAND
FASTTRAIN_SQUARES(FT_SQUARES_KERNEL)
#endif
#endif
