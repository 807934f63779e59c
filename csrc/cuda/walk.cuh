// How a CUDA step walks memory: a table of chunks, and 16-byte accesses inside a chunk. No maths.
//
// Nothing here synchronises threads, so every function takes the place of its thread as an argument, and g++ compiles
// the same text (host_walk.cpp) to be walked block by block and thread by thread.
#pragma once
#include "common.h"
#if !defined(__CUDACC__) && !defined(__CUDACC_RTC__)
#include "cuda/host_walk.h"
#endif

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FT_UNROLL _Pragma("unroll")
#else
#define FT_UNROLL
#endif

namespace fasttrain {

constexpr int kAccess = 16;  // bytes: the widest access of one thread

#if !defined(__CUDACC__) && !defined(__CUDACC_RTC__)
void check_address(const void* at, int bytes);  // host_walk.cpp: throws if it is not a multiple of `bytes`
#endif

inline namespace FT_ISA {

struct Place {
  u32 thread, threads;  // in the block
  u32 block, blocks;    // in the grid
};

template <int... I> struct Indices {};
template <int N, int... I> struct Upto : Upto<N - 1, N - 1, I...> {};
template <int... I> struct Upto<0, I...> { using type = Indices<I...>; };

template <int Bytes> struct BitsOf;
template <> struct BitsOf<1> { using type = u8; };
template <> struct BitsOf<2> { using type = u16; };
template <> struct BitsOf<4> { using type = u32; };
template <> struct BitsOf<8> { using type = u64; };
template <int Bytes> using Bits = typename BitsOf<Bytes>::type;

struct alignas(kAccess) Words { u32 word[4]; };

// --- One access. On the GPU in assembly: the addresses come from a table, so the compiler cannot know that they are
// global memory, and it may split an access of 16 bytes.
#if defined(__CUDA_ARCH__)
__device__ __forceinline__ Words load_words(const char* at) {
  Words w;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3]) : "l"(at));
  return w;
}
__device__ __forceinline__ void store_words(char* at, const Words& w) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :: "l"(at), "r"(w.word[0]), "r"(w.word[1]), "r"(w.word[2]), "r"(w.word[3]) : "memory");
}
__device__ __forceinline__ void load_bits(const char* at, u8& bits) {
  u16 wider;
  asm volatile("ld.global.u8 %0, [%1];" : "=h"(wider) : "l"(at));
  bits = static_cast<u8>(wider);
}
__device__ __forceinline__ void store_bits(char* at, u8 bits) {
  asm volatile("st.global.u8 [%0], %1;" :: "l"(at), "h"(static_cast<u16>(bits)) : "memory");
}
__device__ __forceinline__ void load_bits(const char* at, u16& bits) {
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(bits) : "l"(at));
}
__device__ __forceinline__ void load_bits(const char* at, u32& bits) {
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(bits) : "l"(at));
}
__device__ __forceinline__ void load_bits(const char* at, u64& bits) {
  asm volatile("ld.global.u64 %0, [%1];" : "=l"(bits) : "l"(at));
}
__device__ __forceinline__ void store_bits(char* at, u16 bits) {
  asm volatile("st.global.u16 [%0], %1;" :: "l"(at), "h"(bits) : "memory");
}
__device__ __forceinline__ void store_bits(char* at, u32 bits) {
  asm volatile("st.global.u32 [%0], %1;" :: "l"(at), "r"(bits) : "memory");
}
__device__ __forceinline__ void store_bits(char* at, u64 bits) {
  asm volatile("st.global.u64 [%0], %1;" :: "l"(at), "l"(bits) : "memory");
}
#elif !defined(__CUDACC__)
HOST_DEVICE Words load_words(const char* at) {
  check_address(at, kAccess);
  ++accesses.wide;
  Words w;
  __builtin_memcpy(&w, at, kAccess);
  return w;
}
HOST_DEVICE void store_words(char* at, const Words& w) {
  check_address(at, kAccess);
  ++accesses.wide;
  __builtin_memcpy(at, &w, kAccess);
}
template <class B>
HOST_DEVICE void load_bits(const char* at, B& bits) {
  check_address(at, sizeof(B));
  ++accesses.narrow;
  __builtin_memcpy(&bits, at, sizeof(B));
}
template <class B>
HOST_DEVICE void store_bits(char* at, B bits) {
  check_address(at, sizeof(B));
  ++accesses.narrow;
  __builtin_memcpy(at, &bits, sizeof(B));
}
#endif

// --- N neighbouring elements of one operand, in registers as they lie in memory.
template <int Bytes, int N>
struct Pack {
  static constexpr int count = Bytes * N / kAccess;
  static_assert(count * kAccess == Bytes * N, "a pack is a whole number of accesses");
  Words words[count];

  HOST_DEVICE void load(const char* at) {
    FT_UNROLL
    for (int i = 0; i < count; ++i) words[i] = load_words(at + kAccess * i);
  }
  HOST_DEVICE void store(char* at) const {
    FT_UNROLL
    for (int i = 0; i < count; ++i) store_words(at + kAccess * i, words[i]);
  }
  HOST_DEVICE u32 any() const {  // depends on every access
    u32 bits = 0;
    FT_UNROLL
    for (int i = 0; i < count; ++i) bits |= words[i].word[0];
    return bits;
  }
  HOST_DEVICE Bits<Bytes> get(int i) const {
    const int at = i * Bytes / 4;
    const u32* word = words[at / 4].word + at % 4;
    if constexpr (Bytes == 8) return word[0] | static_cast<u64>(word[1]) << 32;
    else if constexpr (Bytes == 4) return word[0];
    else return static_cast<u16>(word[0] >> (i % 2 * 16));
  }
  HOST_DEVICE void set(int i, Bits<Bytes> bits) {
    static_assert(Bytes >= 4, "elements of two bytes are set in pairs");
    const int at = i * Bytes / 4;
    u32* word = words[at / 4].word + at % 4;
    word[0] = static_cast<u32>(bits);
    if constexpr (Bytes == 8) word[1] = static_cast<u32>(bits >> 32);
  }
  HOST_DEVICE void set_pair(int i, u32 bits) {  // of two bytes each; i is even
    static_assert(Bytes == 2, "larger elements are set one by one");
    words[i / 8].word[i / 2 % 4] = bits;
  }
};

// Where the address of a chunk's gradient is. Gradients change their places between steps, while the table stays: their
// addresses are a column by itself, which is copied alone, or in the table if there is none.
HOST_DEVICE const i64* gradient_of(const i64* gradients, i64 chunk, const i64* in_table) {
  return gradients == nullptr ? in_table : gradients + chunk;
}

// --- One row of the table: addresses of p, g and the states, elements, row of coefficients, aligned or not.
// The last is for kernels that cannot peel; here every chunk finds its own first aligned element.
HOST_DEVICE constexpr int table_columns(int streams) { return streams + 3; }

template <int Streams>
struct Chunk {
  char* at[Streams];
  u32 elements;  // below 2^31, so that what is added to it fits
  u32 zero;      // the upper half of the count, of which the compiler does not know that it is zero
  i64 row;

  HOST_DEVICE explicit Chunk(const i64* table_row) : Chunk(table_row, table_row + 1) {}
  HOST_DEVICE Chunk(const i64* table_row, const i64* gradient)
      : elements(static_cast<u32>(table_row[Streams])), zero(static_cast<u32>(table_row[Streams] >> 32)),
        row(table_row[Streams + 1]) {
    FT_UNROLL
    for (int s = 0; s < Streams; ++s) at[s] = reinterpret_cast<char*>(s == 1 ? *gradient : table_row[s]);
  }

  HOST_DEVICE char* address(int stream, u32 element, int bytes) const {
    return at[stream] + static_cast<u64>(element) * static_cast<u64>(bytes);
  }

  // Elements before the first at which every operand is aligned to 16 bytes, or 2^32 - 1 if there is no such element.
  // `bytes` are the sizes of the elements; one of the smallest decides, the others must agree.
  HOST_DEVICE u32 head(const int (&bytes)[Streams]) const {
    int narrowest = 0;
    FT_UNROLL
    for (int s = 1; s < Streams; ++s)
      if (bytes[s] < bytes[narrowest]) narrowest = s;
    const u32 skip = (0 - low(at[narrowest])) % kAccess / static_cast<u32>(bytes[narrowest]);
    u32 past = 0;
    FT_UNROLL
    for (int s = 0; s < Streams; ++s) past |= low(at[s]) + skip * static_cast<u32>(bytes[s]);
    return past % kAccess == 0 ? skip : ~0u;
  }

  HOST_DEVICE static u32 low(const char* address) { return static_cast<u32>(reinterpret_cast<u64>(address)); }
};

}  // namespace FT_ISA
}  // namespace fasttrain
