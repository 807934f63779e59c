// The CPU step of a tensor that is not plain, compiled once per instruction set like step.cpp and under the same rules.
//
// Pieces of it go through the L1 cache: load codecs, clip, the rule's own kernel, EMA, store codecs. Each is a loop of
// its own, so that combinations cost nothing to build; operands that lie in memory as they are computed stay there.
#include "cpu/kept.h"

#include "cpu/blocks.h"
#include "cpu/elements.h"
#include "cpu/fetch.h"
#include "cpu/step_kernel.h"
#include "draws.h"

namespace fasttrain {
inline namespace FT_ISA {
namespace {

template <u8 Number, class T>
constexpr Codec<T> codec_of() {
  constexpr u8 base = base_of(Number), plain = Number & ~kStochastic;
  if constexpr (!is_codec(Number) || (sizeof(T) == 8 && Number >= kStorages)) {
    return {nullptr, nullptr, nullptr};
  } else if constexpr (base < kStorages) {
    return {load_elements<base, T>, nullptr, store_elements<Number, T>};
  } else if constexpr (base >= kInt8) {
    return {load_blocks<plain>, measure_blocks<plain>, store_blocks<Number>};
  } else {
    switch (base) {
      case kSplit16: return {load_split<short, 0>, nullptr, store_split<short, 0>};
      case kSplit8: return {load_split<signed char, 8>, nullptr, store_split<signed char, 8>};
      case kMasterBF16: return {load_master, nullptr, store_master<kBF16>};
      case kMasterF16: return {load_master, nullptr, store_master<kF16>};
      case kKahanBF16: return {load_kahan<kBF16>, nullptr, store_kahan<kBF16>};
      default: return {load_kahan<kF16>, nullptr, store_kahan<kF16>};
    }
  }
}

template <class T>
struct Table {
  Codec<T> of[kCodecs];
};
template <class T, int... I>
constexpr Table<T> table_of(Indices<I...>) { return {{codec_of<I, T>()...}}; }
template <class T>
constexpr Table<T> codecs = table_of<T>(Upto<kCodecs>::type());

// Where an operand lies in memory as it is computed, or null.
template <class T>
T* in_place(const Operand& o, i64 from) {
  const u8 base = base_of(o.codec);
  if (base == (sizeof(T) == 8 ? kF64 : kF32)) return reinterpret_cast<T*>(o.main) + from;
  if (base == kMasterBF16 || base == kMasterF16) return reinterpret_cast<T*>(o.extra) + from;
  return nullptr;
}

// The draws of elements [from, from + n) of an operand.
void draw(const Kept& kept, int operand, i64 from, i64 n, u32* __restrict to) {
  const u64 key = operand_key(kept.key, operand);
  for (i64 done = 0; done < n;) {  // in stretches of neighbours whose indices have one upper half
    const i64 at = from + done;
    const i64 within = kept.run == 0 ? at : at % kept.run;
    const u64 index = static_cast<u64>(kept.first + (kept.run == 0 ? 0 : at / kept.run * kept.pitch) + within);
    i64 count = n - done;
    if (kept.run != 0 && kept.run - within < count) count = kept.run - within;
    const u32 lower = static_cast<u32>(index);
    const i64 left = (i64{1} << 32) - lower;
    if (left < count) count = left;
    const Drawn drawn(key, static_cast<u32>(index >> 32));
    u32* __restrict bits = to + done;
    for (int i = 0; i < static_cast<int>(count); ++i) bits[i] = drawn.bits(lower + static_cast<u32>(i));
    done += count;
  }
}

template <class T>
void clip(i64 n, const T* from, T* __restrict to, const T scale, const T bound) {
  for (i64 i = 0; i < n; ++i) {
    const T g = from[i] * scale;
    const T above = g < -bound ? -bound : g;
    to[i] = g > bound ? bound : above;
  }
}

template <class T>
void average(i64 n, T* __restrict ema, const T* __restrict p, const T keep, const T add) {
  for (i64 i = 0; i < n; ++i) ema[i] = ema[i] * keep + p[i] * add;
}

// Asks for what is read of a piece and is not in place: loads of the codecs are too short for the processor to see how
// they go on. What the rule's own loop reads it fetches best by itself.
template <class T>
Fetch<2 * kMaxOperands> ahead(const Kept& kept, i64 from) {
  Fetch<2 * kMaxOperands> found;
  for (int o = 0; o < kept.count; ++o) {
    const Operand& operand = kept.operands[o];
    if (in_place<T>(operand, from) != nullptr) continue;
    found.add(operand.main + main_bytes(operand.codec, from), main_bytes(operand.codec, kPiece));
    if (operand.extra != nullptr && block_of(operand.codec) == 0)
      found.add(operand.extra + extra_bytes(operand.codec, from), extra_bytes(operand.codec, kPiece));
  }
  return found;
}

template <class T>
void step_kept(const RuleKernels& rule, const Kept& kept, i64 begin, i64 end, const double* row) {
  const Codec<T>* of = codecs<T>.of;
  const int streams = 2 + rule.states;
  const double* tail = row + 1 + rule.coefficients;
  const T scale = static_cast<T>(row[0]), bound = static_cast<T>(tail[0]);
  const bool clipped = tail[0] != __builtin_inf();
  double own[1 + kMaxCoefficients];
  for (int i = 0; i <= rule.coefficients; ++i) own[i] = row[i];
  if (clipped) own[0] = 1.0;

  // Apart by no multiple of 4,096 bytes, of which a processor takes the one for the other for a while.
  constexpr i64 apart = kPiece + 48;
  alignas(kAligned) T staged[kMaxOperands][apart];
  alignas(kAligned) u32 draws[kMaxOperands][apart];
  float inverse[kMaxOperands][kPiece / 128];
  for (i64 from = begin; from < end; from += kPiece) {
    const i64 n = end - from < kPiece ? end - from : kPiece;
    Fetch<2 * kMaxOperands> next;
    if (from + 2 * kPiece <= end) next = ahead<T>(kept, from + kPiece);
    const i64 share = (next.total() / (2 * kept.count) + kLine - 1) / kLine * kLine;  // after each of the loops below
    T* at[kMaxOperands];
    Stream stream[kMaxStreams];
    for (int o = 0; o < kept.count; ++o) {
      const Operand& operand = kept.operands[o];
      at[o] = in_place<T>(operand, from);
      // The rule's kernel goes one by one to where p is aligned: not in every piece.
      if (at[o] == nullptr || (o == 0 && reinterpret_cast<u64>(at[o]) % kAligned != 0)) {
        at[o] = staged[o];
        of[operand.codec].load(operand, from, n, at[o]);
        next.some(share);
      }
    }
    if (clipped) {
      clip(n, at[1], staged[1], scale, bound);
      at[1] = staged[1];
    }
    for (int s = 0; s < streams; ++s) stream[s] = {reinterpret_cast<char*>(at[s]), sizeof(T) == 8 ? kF64 : kF32};
    (sizeof(T) == 8 ? rule.wide : rule.narrow)(stream, 0, n, own);
    if (kept.count > streams) average(n, at[streams], at[0], static_cast<T>(tail[1]), static_cast<T>(tail[2]));
    // Whole-number work while the last divisions of the rule are under way.
    for (int o = 0; o < kept.count; ++o)
      if ((kept.operands[o].codec & kStochastic) != 0) draw(kept, o, from, n, draws[o]);
    next.some(share);
    for (int o = 0; o < kept.count; ++o) {  // all before the first is needed: the maximum of a block takes its time
      const Operand& operand = kept.operands[o];
      const auto measure = of[operand.codec].measure;
      if (o != 1 && measure != nullptr) measure(operand, from, n, at[o], inverse[o]);
    }
    for (int o = 0; o < kept.count; ++o) {
      const Operand& operand = kept.operands[o];
      if (o == 1 || (base_of(operand.codec) < kStorages && at[o] != staged[o])) continue;
      of[operand.codec].store(operand, from, n, at[o], inverse[o], draws[o]);
      next.some(share);
    }
    if (kept.zero) {
      const i64 size = storage_bytes(base_of(kept.operands[1].codec));
      __builtin_memset(kept.operands[1].main + from * size, 0, static_cast<u64>(n * size));
    }
  }
}

}  // namespace
}  // namespace FT_ISA

namespace FT_ISA {
extern const KeptKernels kept;
const KeptKernels kept{step_kept<float>, step_kept<double>, codecs<float>.of, codecs<double>.of};
}  // namespace FT_ISA
}  // namespace fasttrain
