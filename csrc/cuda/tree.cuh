// Sums of sums by the tree of cpu/lanes.h: neighbours in pairs, level by level. What is absent counts as zero, which is
// the same as handing the last of an odd number up: no sum is -0.0, because none begins there.
//
// A block adds one list at a time, eight levels between two barriers: a warp takes 256 neighbours, eight to a lane.
#pragma once
#include "cuda/warp.cuh"

namespace fasttrain {
inline namespace FT_ISA {

// The warps of a block, and a barrier after each phase. On the host one thread is the whole block.
struct Block {
  Place place;
#if defined(__CUDA_ARCH__)
  __device__ bool absent() const { return false; }
  template <class F> __device__ __forceinline__ void each_warp(F f) const {
    f(place.thread / 32, place.threads / 32);
    __syncthreads();
  }
#else
  HOST_DEVICE bool absent() const { return place.thread != 0; }
  template <class F> HOST_DEVICE void each_warp(F f) const {
    for (u32 warp = 0; warp < place.threads; ++warp) f(warp, place.threads);
  }
#endif
};

// A row of the table: the address of the list, or zero for `out`; how many; the address of a workspace, where each level
// but the last leaves one sum for 256 of the level below; the place of the sum in `out`, in units of `Sums`; and that of
// a byte there which says whether the second number is not zero, in bytes, or -1.
struct Tree {
  static constexpr int columns = 5;
  static constexpr int each = 8;
  static constexpr i64 together = 32 * each;

  struct Held {
    Sums sums;
  };

  HOST_DEVICE static Sums group(const char* from, u32 count) {
    Warp<Held> warp;
    warp.each([&](Held& held, u32 lane) {
      Sums x[each];
      const u32 first = lane * each;
      if (first + each <= count) {
        FT_UNROLL
        for (u32 e = 0; e < each; ++e) x[e] = load_sums(from + (first + e) * sizeof(Sums));
      } else {
        FT_UNROLL
        for (u32 e = 0; e < each; ++e) {
          x[e] = {0.0, 0.0};
          if (first + e < count) x[e] = load_sums(from + (first + e) * sizeof(Sums));
        }
      }
      FT_UNROLL
      for (int n = each / 2; n > 0; n /= 2)
        FT_UNROLL
        for (int e = 0; e < n; ++e) x[e] = {x[2 * e].a + x[2 * e + 1].a, x[2 * e].b + x[2 * e + 1].b};
      held.sums = x[0];
    });
    warp.template add_across<32>([](Held& held) -> double& { return held.sums.a; });
    warp.template add_across<32>([](Held& held) -> double& { return held.sums.b; });
    Sums sums{};
    warp.each([&](Held& held, u32) { sums = held.sums; });
    return sums;
  }

  HOST_DEVICE static void walk(const i64* table, i64 lists, char* out, Place place, char*) {
    const Block block{place};
    if (block.absent()) return;
    for (i64 list = place.block; list < lists; list += place.blocks) {
      const i64* row = table + list * columns;
      const char* from = row[0] == 0 ? out : reinterpret_cast<const char*>(row[0]);
      char* to = reinterpret_cast<char*>(row[2]);
      i64 count = row[1];
      for (bool last = false; !last;) {
        const i64 groups = count <= together ? 1 : (count + together - 1) / together;
        last = groups == 1;
        block.each_warp([&](u32 warp, u32 warps) {
          for (i64 g = warp; g < groups; g += warps) {
            const i64 left = count - g * together;
            const Sums sums = group(from + g * together * static_cast<i64>(sizeof(Sums)),
                                    static_cast<u32>(left < together ? left : together));
            if (!first_lane()) continue;
            store_sums(last ? out + row[3] * static_cast<i64>(sizeof(Sums)) : to + g * static_cast<i64>(sizeof(Sums)),
                       sums.a, sums.b);
            if (last && row[4] >= 0) store_bits(out + row[4], static_cast<u8>(sums.b != 0.0));
          }
        });
        from = to;
        to += groups * static_cast<i64>(sizeof(Sums));
        count = groups;
      }
    }
  }
#if defined(__CUDA_ARCH__)
  __device__ static bool first_lane() { return threadIdx.x % 32 == 0; }
#else
  HOST_DEVICE static bool first_lane() { return true; }
#endif
};

}  // namespace FT_ISA
}  // namespace fasttrain

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FT_TREE_KERNEL(Name)                                                                              \
  extern "C" __global__ void __launch_bounds__(256)                                                       \
  Name(const fasttrain::i64* table, fasttrain::i64 lists, char* out) {                                    \
    using namespace fasttrain;                                                                            \
    Tree::walk(table, lists, out, Place{threadIdx.x, blockDim.x, blockIdx.x, gridDim.x}, nullptr);        \
  }
#ifndef FT_ON_DEMAND
FT_TREE_KERNEL(tree)
#endif
#endif
