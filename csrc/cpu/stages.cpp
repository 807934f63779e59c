// Kernels of stages: compiled once per instruction set, like step.cpp, and under the same rules.
#include "cpu/stages.h"

#include "cpu/lanes.h"
#include "cpu/staged.h"
#include "stage_rules.h"

namespace fasttrain {
inline namespace FT_ISA {
namespace {

constexpr i64 kPiece = 512;

template <int... I> struct Indices {};
template <int N, int... I> struct Upto : Upto<N - 1, N - 1, I...> {};
template <int... I> struct Upto<0, I...> { using type = Indices<I...>; };

// `in` is p, g and the states, `out` p and the states, which lie where `in` does or elsewhere.
template <class Rule, class T, int... I, int... J>
void apply(i64 n, const T* const* in, T* const* out, [[maybe_unused]] T (*terms)[kPiece], const T scale, const typename Rule::K k,
           Indices<I...>, Indices<J...>) {
  const T *p = in[0], *g = in[1];
  [[maybe_unused]] const T* from[kMaxStates] = {in[2 + I]...};
  [[maybe_unused]] T* to[kMaxStates] = {out[1 + I]...};
  T* new_p = out[0];
#pragma GCC ivdep
  for (i64 i = 0; i < n; ++i) {
    T param = p[i];
    [[maybe_unused]] T state[kMaxStates], term[kMaxSums];
    ((state[I] = from[I][i]), ...);
    Rule::element(param, g[i] * scale, state[I]..., term[J]..., k);
    if constexpr ((Rule::changed & 1) != 0) new_p[i] = param;
    (((Rule::changed >> (1 + I) & 1) != 0 ? void(to[I][i] = without_denormal(state[I])) : void()), ...);
    ((terms[J][i] = term[J]), ...);
  }
}

template <template <class> class RuleOf, class T>
void stage(const Stream* streams, i64 begin, i64 end, const double* row, double* sums) {
  using Rule = RuleOf<T>;
  constexpr int count = 2 + Rule::states;
  T coefficients[kMaxCoefficients];
  for (int i = 0; i < Rule::coefficients; ++i) coefficients[i] = static_cast<T>(row[1 + i]);
  const T scale = static_cast<T>(row[0]);
  const typename Rule::K k(coefficients);

  alignas(64) T staged[count][kPiece];
  alignas(64) T terms[kMaxSums][kPiece];
  double blocks[kMaxSums][kSumChunk / kSumBlock];
  int done = 0;
  for (i64 block = begin; block < end; block += kSumBlock) {
    const i64 last = end - block < kSumBlock ? end : block + kSumBlock;
    double lanes[kMaxSums][kLanes] = {};
    for (i64 from = block; from < last; from += kPiece) {
      const i64 n = last - from < kPiece ? last - from : kPiece;
      const T* in[count];
      T* out[count - 1];
      for (int s = 0; s < count; ++s) in[s] = read(streams[s], from, n, staged[s]);
      for (int s = 0; s < count; ++s)
        if (s != 1) out[s == 0 ? 0 : s - 1] = place(streams[s], from, staged[s]);
      apply<Rule, T>(n, in, out, terms, scale, k, typename Upto<Rule::states>::type(), typename Upto<Rule::sums>::type());
      for (int s = 0; s < count; ++s)
        if (s != 1 && (Rule::changed >> (s == 0 ? 0 : s - 1) & 1) != 0) write(streams[s], from, n, out[s == 0 ? 0 : s - 1]);
      for (int s = 0; s < Rule::sums; ++s) add_to_lanes<Itself>(lanes[s], terms[s], n);
    }
    for (int s = 0; s < Rule::sums; ++s) blocks[s][done] = tree(lanes[s], kLanes);
    ++done;
  }
  for (int s = 0; s < Rule::sums; ++s) sums[s] = tree(blocks[s], done);
}

#define FT_STAGE(Name)                                                                                      \
  {#Name, Name<float>::digest, Name<float>::states, Name<float>::coefficients, Name<float>::sums,           \
   Name<float>::changed, stage<Name, float>, stage<Name, double>},
const StageKernels table[] = {FASTTRAIN_STAGES(FT_STAGE)};
#undef FT_STAGE

}  // namespace
}  // namespace FT_ISA

namespace FT_ISA {
extern const StagesIsa stages;
const StagesIsa stages{table, static_cast<int>(sizeof(table) / sizeof(table[0]))};
}  // namespace FT_ISA
}  // namespace fasttrain
