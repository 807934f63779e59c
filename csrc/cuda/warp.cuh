// A warp, and the memory that its threads share. A function of a warp is a sequence of phases: in `each` every thread
// works by itself, `barrier` lies between a phase that writes shared memory and one that reads it, and the rest are
// exchanges. So g++ compiles the same text: on the host one thread is a whole warp, which runs a phase for one lane after
// the other, and what walks it counts warps where a GPU counts threads.
#pragma once
#include "cuda/walk.cuh"

namespace fasttrain {
inline namespace FT_ISA {

#if defined(__CUDA_ARCH__)
template <class T>
struct Warp {
  T own;
  template <class F> __device__ __forceinline__ void each(F f) { f(own, threadIdx.x % 32); }
  template <class F> __device__ __forceinline__ u32 largest(F f) { return __reduce_max_sync(~0u, f(own)); }
  template <class F> __device__ __forceinline__ bool any(F f) { return __any_sync(~0u, f(own)) != 0; }
  template <class F> __device__ __forceinline__ auto of(u32 lane, F f) {  // what one lane has
    return __shfl_sync(~0u, f(own), static_cast<int>(lane));
  }
  // Adds the numbers of each group of `Lanes` lanes by the tree of cpu/lanes.h; all of them receive the sum.
  template <u32 Lanes, class F> __device__ __forceinline__ void add_across(F of) {
    FT_UNROLL
    for (u32 apart = 1; apart < Lanes; apart *= 2) of(own) += __shfl_xor_sync(~0u, of(own), apart);
  }
  __device__ static void barrier() { __syncwarp(); }
  __device__ static u32 number(const Place& place) { return place.thread / 32; }
  __device__ static u32 count(const Place& place) { return place.threads / 32; }
};
#else
template <class T>
struct Warp {
  T lanes[32];
  template <class F> HOST_DEVICE void each(F f) {
    for (u32 lane = 0; lane < 32; ++lane) f(lanes[lane], lane);
  }
  template <class F> HOST_DEVICE u32 largest(F f) {
    u32 most = 0;
    for (T& lane : lanes) most = f(lane) > most ? f(lane) : most;
    return most;
  }
  template <class F> HOST_DEVICE bool any(F f) {
    bool found = false;
    for (T& lane : lanes) found |= static_cast<bool>(f(lane));
    return found;
  }
  template <class F> HOST_DEVICE auto of(u32 lane, F f) { return f(lanes[lane % 32]); }
  template <u32 Lanes, class F> HOST_DEVICE void add_across(F of) {
    for (u32 apart = 1; apart < Lanes; apart *= 2) {
      double before[32];
      for (u32 lane = 0; lane < 32; ++lane) before[lane] = of(lanes[lane]);
      for (u32 lane = 0; lane < 32; ++lane) of(lanes[lane]) = before[lane] + before[lane ^ apart];
    }
  }
  HOST_DEVICE static void barrier() {}
  HOST_DEVICE static u32 number(const Place& place) { return place.thread; }
  HOST_DEVICE static u32 count(const Place& place) { return place.threads; }
};
#endif

// --- Shared memory: one access, as walk.cuh has them of global memory.
#if defined(__CUDA_ARCH__)
__device__ __forceinline__ u32 shared_address(const char* at) { return static_cast<u32>(__cvta_generic_to_shared(at)); }
__device__ __forceinline__ void share_words(char* at, const Words& w) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
               :: "r"(shared_address(at)), "r"(w.word[0]), "r"(w.word[1]), "r"(w.word[2]), "r"(w.word[3]) : "memory");
}
__device__ __forceinline__ void share_bits(char* at, u16 bits) {
  asm volatile("st.shared.u16 [%0], %1;" :: "r"(shared_address(at)), "h"(bits) : "memory");
}
__device__ __forceinline__ void share_bits(char* at, u32 bits) {
  asm volatile("st.shared.u32 [%0], %1;" :: "r"(shared_address(at)), "r"(bits) : "memory");
}
__device__ __forceinline__ void share_bits(char* at, u64 bits) {
  asm volatile("st.shared.u64 [%0], %1;" :: "r"(shared_address(at)), "l"(bits) : "memory");
}
__device__ __forceinline__ void shared_bits(const char* at, u16& bits) {
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(shared_address(at)) : "memory");
}
__device__ __forceinline__ void shared_bits(const char* at, u32& bits) {
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(bits) : "r"(shared_address(at)) : "memory");
}
__device__ __forceinline__ void shared_bits(const char* at, u64& bits) {
  asm volatile("ld.shared.u64 %0, [%1];" : "=l"(bits) : "r"(shared_address(at)) : "memory");
}
#elif !defined(__CUDACC__)
HOST_DEVICE void share_words(char* at, const Words& w) {
  check_address(at, kAccess);
  __builtin_memcpy(at, &w, kAccess);
}
template <class B>
HOST_DEVICE void share_bits(char* at, B bits) {
  check_address(at, sizeof(B));
  __builtin_memcpy(at, &bits, sizeof(B));
}
template <class B>
HOST_DEVICE void shared_bits(const char* at, B& bits) {
  check_address(at, sizeof(B));
  __builtin_memcpy(&bits, at, sizeof(B));
}
#endif

// --- Two sums of one stretch of elements, as they lie in a workspace. A kernel with one sum counts in the other.
struct Sums {
  double a, b;
};

HOST_DEVICE Sums load_sums(const char* at) {
  const Words w = load_words(at);
  return {bit_cast<double>(w.word[0] | static_cast<u64>(w.word[1]) << 32),
          bit_cast<double>(w.word[2] | static_cast<u64>(w.word[3]) << 32)};
}
HOST_DEVICE void store_sums(char* at, double a, double b) {
  const u64 first = bit_cast<u64>(a), second = bit_cast<u64>(b);
  store_words(at, Words{{static_cast<u32>(first), static_cast<u32>(first >> 32), static_cast<u32>(second),
                         static_cast<u32>(second >> 32)}});
}

constexpr u32 kSumLanes = 16, kSumElements = 4096;  // kLanes and kSumBlock of cpu/lanes.h

}  // namespace FT_ISA
}  // namespace fasttrain
