// The kernels of pack.h: compiled once per instruction set, like step.cpp, and under the same rules. What reads and
// writes a storage are its codec's functions, so that every storage is moved to and added from.
#include "cpu/pack.h"

#include "codecs.h"

namespace fasttrain {
inline namespace FT_ISA {

namespace {

template <class T> struct Of;
template <> struct Of<float> {
  static const Codec<float>& codec(const Operand& o) { return FT_ISA::kept.codecs[o.codec]; }
  using Bits = u32;
  static constexpr Bits infinite = 0x7F800000u, magnitude = 0x7FFFFFFFu;
};
template <> struct Of<double> {
  static const Codec<double>& codec(const Operand& o) { return FT_ISA::kept.wide_codecs[o.codec]; }
  using Bits = u64;
  static constexpr Bits infinite = 0x7FF0000000000000ull, magnitude = 0x7FFFFFFFFFFFFFFFull;
};

template <class T>
void scale_all(T* __restrict values, i64 n, const T scale) {
  for (i64 i = 0; i < n; ++i) values[i] *= scale;
}

template <class T>
void add_all(T* __restrict values, i64 n, const T* __restrict more) {
  for (i64 i = 0; i < n; ++i) values[i] += more[i];
}

template <class T>
void take_lost(const T* __restrict values, i64 n, T* __restrict sent) {
  using Bits = typename Of<T>::Bits;
  for (i64 i = 0; i < n; ++i) {  // by a mask, so that it vectorises
    const bool finite = (bit_cast<Bits>(sent[i]) & Of<T>::magnitude) < Of<T>::infinite;
    const Bits mask = Bits{0} - static_cast<Bits>(finite);
    sent[i] = bit_cast<T>(bit_cast<Bits>(values[i] - sent[i]) & mask);
  }
}

template <class T>
void store(const Operand& to, i64 from, i64 n, const T* values) {
  float inverse[kPiece / 128];
  const Codec<T>& codec = Of<T>::codec(to);
  if (codec.measure != nullptr) codec.measure(to, from, n, values, inverse);
  codec.store(to, from, n, values, inverse, nullptr);
}

template <class T>
void move(const Move& m, i64 begin, i64 end) {
  alignas(64) T values[kPiece], other[kPiece + 48];
  const T scale = static_cast<T>(m.scale);
  for (i64 from = begin; from < end; from += kPiece) {
    const i64 n = end - from < kPiece ? end - from : kPiece;
    Of<T>::codec(m.from).load(m.from, from, n, values);
    if (scale != T{1}) scale_all(values, n, scale);
    if (m.feedback) {
      Of<T>::codec(m.lost).load(m.lost, from, n, other);
      add_all(values, n, other);
    }
    store(m.to, from, n, values);
    if (m.feedback) {
      Of<T>::codec(m.to).load(m.to, from, n, other);
      take_lost(values, n, other);
      store(m.lost, from, n, other);
    }
  }
}

// Without a stage in between, where there is no residual. An element may be written where it was read.
template <u8 From, u8 To, class T>
void move_at_once(const Move& m, i64 begin, i64 end) {
  const T scale = static_cast<T>(m.scale);
#pragma GCC ivdep
  for (i64 i = begin; i < end; ++i) store_element<T>(m.to.main, To, i, load_element<T>(m.from.main, From, i) * scale);
}

template <u8 From>
void move_to(const Move& m, i64 begin, i64 end) {
  switch (m.to.codec) {
    case kF32: return move_at_once<From, kF32, float>(m, begin, end);
    case kBF16: return move_at_once<From, kBF16, float>(m, begin, end);
    default: return move_at_once<From, kF16, float>(m, begin, end);
  }
}

void move_any(const Move& m, i64 begin, i64 end) {
  if (m.from.codec == m.to.codec && m.scale == 1.0 && !m.feedback) {
    const i64 size = storage_bytes(m.from.codec);
    if (m.from.main != m.to.main)
      __builtin_memcpy(m.to.main + begin * size, m.from.main + begin * size, static_cast<u64>((end - begin) * size));
  } else if (m.wide || m.feedback || m.to.codec >= kStorages) {
    (m.wide ? move<double> : move<float>)(m, begin, end);
  } else {
    (m.from.codec == kF32 ? move_to<kF32> : m.from.codec == kBF16 ? move_to<kBF16> : move_to<kF16>)(m, begin, end);
  }
}

template <class T>
void sum(const Sum& s, i64 begin, i64 end) {
  alignas(64) T total[kPiece], more[kPiece + 48];
  const T scale = static_cast<T>(s.scale);
  const Operand* chunks = s.chunks.data();
  const i64 count = static_cast<i64>(s.chunks.size());
  const auto load = Of<T>::codec(chunks[0]).load;
  for (i64 from = begin; from < end; from += kPiece) {
    const i64 n = end - from < kPiece ? end - from : kPiece;
    load(chunks[0], from, n, total);
    for (i64 c = 1; c < count; ++c) {
      load(chunks[c], from, n, more);
      add_all(total, n, more);
    }
    if (scale != T{1}) scale_all(total, n, scale);
    store(s.to, from, n, total);
  }
}

// The first two chunks at once, and no chunk staged. How many elements is not said to the compiler, which would keep a
// known number of them in registers, one by one.
template <u8 From>
void add_two(float* __restrict total, const void* one, const void* other, i64 from, i64 n) {
  for (i64 i = 0; i < n; ++i)
    total[i] = load_element<float>(one, From, from + i) + load_element<float>(other, From, from + i);
}

template <u8 From>
void add_one(float* __restrict total, const void* one, i64 from, i64 n) {
  for (i64 i = 0; i < n; ++i) total[i] += load_element<float>(one, From, from + i);
}

template <u8 To>
void store_scaled(void* to, const float* __restrict total, i64 from, i64 n, float scale) {
  for (i64 i = 0; i < n; ++i) store_element<float>(to, To, from + i, total[i] * scale);
}

template <u8 From, u8 To>
void sum_at_once(const Sum& s, i64 begin, i64 end) {
  alignas(64) float total[kPiece];
  const i64 count = static_cast<i64>(s.chunks.size());
  for (i64 from = begin; from < end; from += kPiece) {
    const i64 n = end - from < kPiece ? end - from : kPiece;
    add_two<From>(total, s.chunks[0].main, s.chunks[1].main, from, n);
    for (i64 c = 2; c < count; ++c) add_one<From>(total, s.chunks[c].main, from, n);
    store_scaled<To>(s.to.main, total, from, n, static_cast<float>(s.scale));
  }
}

template <u8 From>
void sum_to(const Sum& s, i64 begin, i64 end) {
  switch (s.to.codec) {
    case kF32: return sum_at_once<From, kF32>(s, begin, end);
    case kBF16: return sum_at_once<From, kBF16>(s, begin, end);
    default: return sum_at_once<From, kF16>(s, begin, end);
  }
}

void sum_any(const Sum& s, i64 begin, i64 end) {
  const u8 kind = s.chunks[0].codec;
  if (s.wide) return sum<double>(s, begin, end);
  if (s.chunks.size() == 1 || kind >= kStorages) return sum<float>(s, begin, end);
  (kind == kF32 ? sum_to<kF32> : kind == kBF16 ? sum_to<kBF16> : sum_to<kF16>)(s, begin, end);
}

}  // namespace
}  // namespace FT_ISA

namespace FT_ISA {
extern const PackKernels pack;
const PackKernels pack{move_any, sum_any};
}  // namespace FT_ISA
}  // namespace fasttrain
