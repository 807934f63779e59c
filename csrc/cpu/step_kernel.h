// The CPU step of any rule, as templates. `step.cpp` compiles it for the rules of `rules.h`; a rule that is compiled on
// demand includes it too.
// No standard library template may be used here: the linker keeps one copy of those, whichever set it came from.
#pragma once
#include "codecs.h"
#include "step.h"

namespace fasttrain {
inline namespace FT_ISA {
namespace {

constexpr i64 kStaged = 512;  // elements staged at once: 8 streams of fp32 take 16 KiB of the L1 cache
constexpr i64 kAligned = 64;  // bytes

template <class T> constexpr u8 storage_of() { return sizeof(T) == 8 ? kF64 : kF32; }

template <int... I> struct Indices {};
template <int N, int... I> struct Upto : Upto<N - 1, N - 1, I...> {};
template <int... I> struct Upto<0, I...> { using type = Indices<I...>; };

// One rule over n elements that lie in memory as T. `#pragma GCC ivdep`: the streams do not overlap.
template <class Rule, class T, int... I>
void apply(i64 n, T* __restrict p, const T* __restrict g, [[maybe_unused]] T* const* states, const T scale, const typename Rule::K k,
           Indices<I...>) {
  [[maybe_unused]] T* __restrict s[kMaxStates] = {};
  ((s[I] = states[I]), ...);
#pragma GCC ivdep
  for (i64 i = 0; i < n; ++i) {
    T param = p[i];
    [[maybe_unused]] T state[kMaxStates];
    ((state[I] = s[I][i]), ...);
    Rule::element(param, g[i] * scale, state[I]..., k);
    p[i] = param;
    ((s[I][i] = without_denormal(state[I])), ...);
  }
}

template <class T>
void load(const Stream& stream, i64 begin, i64 n, T* __restrict to) {
  const void* from = stream.at;
  switch (stream.storage) {  // one loop per storage, so that each vectorises
    case kF32: for (i64 i = 0; i < n; ++i) to[i] = load_element<T>(from, kF32, begin + i); break;
    case kF64: for (i64 i = 0; i < n; ++i) to[i] = load_element<T>(from, kF64, begin + i); break;
    case kBF16: for (i64 i = 0; i < n; ++i) to[i] = load_element<T>(from, kBF16, begin + i); break;
    default: for (i64 i = 0; i < n; ++i) to[i] = load_element<T>(from, kF16, begin + i); break;
  }
}

template <class T>
void store(const Stream& stream, i64 begin, i64 n, const T* __restrict from) {
  void* to = stream.at;
  switch (stream.storage) {
    case kF32: for (i64 i = 0; i < n; ++i) store_element(to, kF32, begin + i, from[i]); break;
    case kF64: for (i64 i = 0; i < n; ++i) store_element(to, kF64, begin + i, from[i]); break;
    case kBF16: for (i64 i = 0; i < n; ++i) store_element(to, kBF16, begin + i, from[i]); break;
    default: for (i64 i = 0; i < n; ++i) store_element(to, kF16, begin + i, from[i]); break;
  }
}

template <template <class> class RuleOf, class T>
void step(const Stream* streams, i64 begin, i64 end, const double* row) {
  using Rule = RuleOf<T>;
  using States = typename Upto<Rule::states>::type;
  constexpr int count = 2 + Rule::states;
  T coefficients[kMaxCoefficients];
  for (int i = 0; i < Rule::coefficients; ++i) coefficients[i] = static_cast<T>(row[1 + i]);
  const T scale = static_cast<T>(row[0]);
  const typename Rule::K k(coefficients);

  bool direct = true;  // every stream is kept as T: work in place
  for (int s = 0; s < count; ++s) direct &= streams[s].storage == storage_of<T>();
  T* at[kMaxStreams];
  if (direct) {
    for (int s = 0; s < count; ++s) at[s] = reinterpret_cast<T*>(streams[s].at) + begin;
    const i64 n = end - begin;
    const i64 past = static_cast<i64>(reinterpret_cast<u64>(at[0]) % kAligned);
    const i64 peel = past == 0 ? 0 : (kAligned - past) / static_cast<i64>(sizeof(T));
    const i64 head = peel < n ? peel : n;
    if (head != 0) {
      apply<Rule, T>(head, at[0], at[1], at + 2, scale, k, States());
      for (int s = 0; s < count; ++s) at[s] += head;
    }
    apply<Rule, T>(n - head, at[0], at[1], at + 2, scale, k, States());
    return;
  }
  alignas(kAligned) T staged[kMaxStreams][kStaged];
  for (i64 from = begin; from < end; from += kStaged) {
    const i64 n = end - from < kStaged ? end - from : kStaged;
    for (int s = 0; s < count; ++s) {
      if (streams[s].storage == storage_of<T>()) {
        at[s] = reinterpret_cast<T*>(streams[s].at) + from;
      } else {
        load(streams[s], from, n, staged[s]);
        at[s] = staged[s];
      }
    }
    apply<Rule, T>(n, at[0], at[1], at + 2, scale, k, States());
    for (int s = 0; s < count; ++s)
      if (s != 1 && at[s] == staged[s]) store(streams[s], from, n, staged[s]);
  }
}

}  // namespace
}  // namespace FT_ISA
}  // namespace fasttrain

// A rule's line in the table of kernels.
#define FT_ROW(Name) {#Name, Name<float>::digest, Name<float>::states, Name<float>::coefficients, step<Name, float>, step<Name, double>},

#define FT_TEXT(name) FT_QUOTE(name)
#define FT_QUOTE(name) #name
