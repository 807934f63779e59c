// Plain numbers to int8 codes for the wire, scaled and with error feedback (fasttrain/kernels/chunks.py): a warp owns
// tiles of 256 elements, which are the blocks that share a unit, as in kept.cuh.
#pragma once
#include "cuda/eight.cuh"
#include "cuda/pack.cuh"
#include "cuda/warp.cuh"

namespace fasttrain {
inline namespace FT_ISA {

// A row of the table: addresses of source, codes, units and residual; elements; the bits of the scale as a double. Rows
// begin at multiples of a tile.
template <u8 From, u8 Lost>
struct EncodeOf {
  static constexpr bool feedback = Lost != kNone;
  static constexpr int columns = 6;
  static constexpr int together = From == kF32 || feedback ? 2 : 4;  // tiles that a warp loads before it computes

  struct Held {
    Lane<From> source;
    Lane<feedback ? Lost : u8{kF32}> lost;  // if feedback
    Lane<kInt8> codes;
    float x[kEach];
    u32 at;
  };

  struct Row {
    Arrays source, codes, lost;
    u32 elements, zero;  // zero: as in walk.cuh
    float scale;
    bool aligned;

    HOST_DEVICE explicit Row(const i64* row)
        : source{address(row[0]), nullptr}, codes{address(row[1]), address(row[2])}, lost{address(row[3]), nullptr},
          elements(static_cast<u32>(row[4])), zero(static_cast<u32>(row[4] >> 32)),
          scale(static_cast<float>(bit_cast<double>(row[5]))),
          aligned((row[0] | row[3]) % kAccess == 0 && row[1] % kEach == 0) {}
    HOST_DEVICE static char* address(i64 word) { return reinterpret_cast<char*>(word); }
  };

  // The tile's first `count` elements; the others count as zero.
  HOST_DEVICE static void compute(Warp<Held>& warp, float scale, u32 count) {
    warp.each([&](Held& held, u32 lane) {
      held.source.decode(held.x);
      [[maybe_unused]] float owed[kEach];
      if constexpr (feedback) held.lost.decode(owed);
      FT_UNROLL
      for (int e = 0; e < kEach; ++e) {
        held.x[e] = held.x[e] * scale;
        if constexpr (feedback) held.x[e] = held.x[e] + owed[e];
        if (lane * kEach + static_cast<u32>(e) >= count) held.x[e] = 0.0f;
      }
    });
    const u32 largest = warp.largest([](Held& held) { return largest_of(held.x); });
    warp.each([&](Held& held, u32) {
      const u32 none[kEach] = {};
      held.codes.encode(held.x, largest, none);
      if constexpr (feedback) {
        float sent[kEach];
        held.codes.decode(sent);
        FT_UNROLL
        for (int e = 0; e < kEach; ++e) sent[e] = left_of(held.x[e], sent[e]);
        held.lost.encode(sent, 0, none);
      }
    });
  }

  HOST_DEVICE static void walk(const i64* table, i64 chunks, const void*, Place place) {
    const u32 number = Warp<Held>::number(place), warps = Warp<Held>::count(place);
    for (i64 c = place.block; c < chunks; c += place.blocks) {
      const Row row(table + c * columns);
      const u32 tiles = row.aligned ? row.elements / kTile : 0;  // in which every access is wide
      for (u32 first = number; first < tiles; first += together * warps) {
        Warp<Held> warp[together];
        u32 arrived = 0;
        FT_UNROLL
        for (u32 u = 0; u < together; ++u) {
          const u32 tile = first + u * warps;
          warp[u].each([&](Held& held, u32 lane) {
            held.at = (tile < tiles ? tile : first) * kTile + lane * kEach;  // past the end: dropped below
            held.source.load(row.source, held.at);
            arrived |= held.source.any();
            if constexpr (feedback) {
              held.lost.load(row.lost, held.at);
              arrived |= held.lost.any();
            }
          });
        }
        const float scale = float_of(bit_cast<u32>(row.scale) | (arrived & row.zero));  // as in pack.cuh
        FT_UNROLL
        for (u32 u = 0; u < together; ++u) {
          if (u > 0 && first + u * warps >= tiles) break;
          compute(warp[u], scale, kTile);
          warp[u].each([&](Held& held, u32) {
            held.codes.store(row.codes, held.at);
            if constexpr (feedback) held.lost.store(row.lost, held.at);
          });
        }
      }
      const u32 all = (row.elements + kTile - 1) / kTile;
      for (u32 tile = tiles + number; tile < all; tile += warps) {
        const u32 left = row.elements - tile * kTile, count = left < kTile ? left : kTile;
        Warp<Held> warp;
        warp.each([&](Held& held, u32 lane) {
          held.at = tile * kTile + lane * kEach;
          held.source.load_first(row.source, held.at, mine(count, lane));
          if constexpr (feedback) held.lost.load_first(row.lost, held.at, mine(count, lane));
        });
        compute(warp, row.scale, count);
        warp.each([&](Held& held, u32 lane) {
          held.codes.store_first(row.codes, held.at, mine(count, lane));
          if constexpr (feedback) held.lost.store_first(row.lost, held.at, mine(count, lane));
        });
      }
    }
  }
  HOST_DEVICE static u32 mine(u32 count, u32 lane) { return count > lane * kEach ? count - lane * kEach : 0; }
};

}  // namespace FT_ISA
}  // namespace fasttrain

// The combinations that are compiled ahead of time: storages of source and residual.
#define FASTTRAIN_ENCODES(X1, X2) X1(F32) X1(BF16) X1(F16) X2(F32, F32) X2(BF16, F32) X2(F16, F32)

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FT_ENCODING_KERNEL(Name, From, Lost)                                                              \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                    \
  Name(const fasttrain::i64* table, fasttrain::i64 chunks, const void* none) {                            \
    using namespace fasttrain;                                                                            \
    EncodeOf<k##From, Lost>::walk(table, chunks, none, Place{threadIdx.x, blockDim.x, blockIdx.x, gridDim.x}); \
  }
#define FT_ENCODE_KERNEL(From) FT_ENCODING_KERNEL(encode_##From, From, kNone)
#define FT_ENCODE_LOST_KERNEL(From, Lost) FT_ENCODING_KERNEL(encode_##From##_##Lost, From, k##Lost)
#ifndef FT_ON_DEMAND
FASTTRAIN_ENCODES(FT_ENCODE_KERNEL, FT_ENCODE_LOST_KERNEL)
#endif
#endif
