#include "cuda/host_walk.h"

#include <stdexcept>
#include <string>

#include "cuda/step.cu"

namespace fasttrain {

thread_local Accesses accesses;

void check_address(const void* at, int bytes) {
  if (reinterpret_cast<u64>(at) % static_cast<u64>(bytes) == 0) return;
  throw std::runtime_error("an access of " + std::to_string(bytes) + " bytes at address " +
                           std::to_string(reinterpret_cast<u64>(at)) + ", which is no multiple: a GPU would stop there");
}

namespace {

template <class Kernel, class T>
void walk(const i64* table, i64 chunks, const void* rows, const i64* gradients, u32 thread, u32 threads, u32 block,
          u32 blocks) {
  Kernel::walk(table, chunks, static_cast<const T*>(rows), gradients, Place{thread, threads, block, blocks});
}

// As it, of kernels whose warps have shared memory.
template <class Kernel, class T>
void walk_shared(const i64* table, i64 chunks, const void* rows, const i64* gradients, u32 thread, u32 threads,
                 u32 block, u32 blocks) {
  alignas(kAccess) char shared[Kernel::shared_bytes_of_warp];
  Kernel::walk(table, chunks, static_cast<const T*>(rows), gradients, Place{thread, threads, block, blocks}, shared);
}

// Of kernels whose tables hold every address.
template <class Kernel, class T>
void walk_table(const i64* table, i64 chunks, const void* rows, const i64*, u32 thread, u32 threads, u32 block,
                u32 blocks) {
  Kernel::walk(table, chunks, static_cast<const T*>(rows), Place{thread, threads, block, blocks});
}

template <class Kernel>
void walk_sum(const i64* table, i64 rows, const void* none, const i64*, u32 thread, u32 threads, u32 block, u32 blocks) {
  alignas(kAccess) char shared[Kernel::shared_bytes_of_warp];
  Kernel::walk(table, rows, none, Place{thread, threads, block, blocks}, shared);
}

void walk_tree(const i64* table, i64 lists, const void* out, const i64*, u32 thread, u32 threads, u32 block,
               u32 blocks) {
  Tree::walk(table, lists, static_cast<char*>(const_cast<void*>(out)), Place{thread, threads, block, blocks}, nullptr);
}

}  // namespace

#define FT_HOST_KERNEL(Rule, T, P, G, S)                                            \
  {"step_" #Rule "_" #P "_" #G "_" #S, sizeof(T) == 8,                              \
   Step<Rule<T>, T, k##P, k##G, k##S>::columns, 1 + Rule<T>::coefficients,          \
   walk<Step<Rule<T>, T, k##P, k##G, k##S>, T>},
#define FT_PLAIN_HOST_KERNELS(Rule) FASTTRAIN_PLAIN(FT_HOST_KERNEL, Rule)
#define FT_ALL_HOST_KERNELS(Rule) FASTTRAIN_PLAIN(FT_HOST_KERNEL, Rule) FASTTRAIN_MIXED(FT_HOST_KERNEL, Rule)
#define FT_HOST_KEPT(Name, Rule, ...)                                                                        \
  {#Name, false, KeptStep<Rule<float>, __VA_ARGS__>::O::columns, KeptStep<Rule<float>, __VA_ARGS__>::width,   \
   walk<KeptStep<Rule<float>, __VA_ARGS__>, float>},
#define FT_HOST_KEPT_1(Rule, P, G, S) FT_HOST_KEPT(kept_##Rule##_##P##_##G##_##S, Rule, P, G, S)
#define FT_HOST_KEPT_2(Rule, P, G, S, Z) FT_HOST_KEPT(kept_##Rule##_##P##_##G##_##S##_##Z, Rule, P, G, S, Z)
#define FT_HOST_FACTORED(S, What, Together, Kernel)                                  \
  {"factored_" #What "_" #S, true, ByRow<Factored<k##S, Together>::Kernel>::columns, FactoredNumbers::count, \
   walk<ByRow<Factored<k##S, Together>::Kernel>, double>},
#define FT_HOST_SQUARES(S) \
  {"squares_" #S, false, Squares<k##S>::columns, 0, walk_shared<Squares<k##S>, float>},
#define FT_HOST_MOVE(From, To)                                                       \
  {"move_" #From "_" #To, false, MoveOf<k##From, k##To, kNone>::columns, 0, walk_table<MoveOf<k##From, k##To, kNone>, char>},
#define FT_HOST_FEEDBACK(From, To, Lost)                                             \
  {"move_" #From "_" #To "_" #Lost, false, MoveOf<k##From, k##To, k##Lost>::columns, 0, \
   walk_table<MoveOf<k##From, k##To, k##Lost>, char>},
#define FT_HOST_ENCODE(From) \
  {"encode_" #From, false, EncodeOf<k##From, kNone>::columns, 0, walk_table<EncodeOf<k##From, kNone>, float>},
#define FT_HOST_ENCODE_LOST(From, Lost) \
  {"encode_" #From "_" #Lost, false, EncodeOf<k##From, k##Lost>::columns, 0, walk_table<EncodeOf<k##From, k##Lost>, float>},
#define FT_HOST_SUM(From, To) \
  {"sum_" #From "_" #To, false, SumOf<codes::From, codes::To>::columns, 0, walk_sum<SumOf<codes::From, codes::To>>},
#define FT_HOST_STAGE(Rule, T, P, G, S)                                              \
  {"stage_" #Rule "_" #P "_" #G "_" #S, sizeof(T) == 8,                              \
   Stage<Rule<T>, T, k##P, k##G, k##S>::columns, 1 + Rule<T>::coefficients,          \
   walk_shared<Stage<Rule<T>, T, k##P, k##G, k##S>, T>},
using namespace codes;
const HostKernel host_kernels[] = {FASTTRAIN_COMMON_RULES(FT_ALL_HOST_KERNELS) FASTTRAIN_OTHER_RULES(FT_PLAIN_HOST_KERNELS)
                                   FASTTRAIN_KEPT(FT_HOST_KEPT_1, FT_HOST_KEPT_2)
                                   FASTTRAIN_SQUARES(FT_HOST_SQUARES) FASTTRAIN_STAGE_KERNELS(FT_HOST_STAGE)
                                   FASTTRAIN_FACTORED(FT_HOST_FACTORED)
                                   FASTTRAIN_MOVES(FT_HOST_MOVE) FASTTRAIN_FEEDBACKS(FT_HOST_FEEDBACK)
                                   FASTTRAIN_ENCODES(FT_HOST_ENCODE, FT_HOST_ENCODE_LOST) FASTTRAIN_SUMS(FT_HOST_SUM)
                                   {"tree", false, Tree::columns, 0, walk_tree},
                                   {"prologue", false, Prologue::columns, 0, walk_table<Prologue, char>},
                                   {"keyed", false, Keyed::columns, 0, walk_table<Keyed, char>},
                                   {"chunks_left", false, Mask::columns, 0, walk_table<Mask, char>},
                                   {"count", false, Count::columns, 0, walk_table<Count, char>}};
const int host_kernel_count = static_cast<int>(sizeof(host_kernels) / sizeof(host_kernels[0]));

}  // namespace fasttrain
