// The prologue of a captured step: rows of coefficients, computed on the device from its step counts. A thread makes a
// row. What a rule's `coefficients` does is a program (fasttrain/kernels/program.py), so one kernel of a few kilobytes
// serves every rule, those of users too, in one launch; compiled, the built-in rules alone took four megabytes. The
// numbers of a row are described by three words each: the address of a number on the device or 0, the type of what lies
// there, and a double, to which that is added. fasttrain/kernels/prologue.py writes the words.
#pragma once
#include "cuda/scalars.cuh"
#include "cuda/walk.cuh"

namespace fasttrain {
inline namespace FT_ISA {

// Before the inputs of the rule's coefficients: `FIXED` in prologue.py.
enum Fixed { kFound, kScale, kGradScale, kNorm, kMaxNorm, kSquare, kMaxEach, kClipValue, kEmaDecay, kFixed };

// What may lie at an address: `KINDS` in prologue.py.
enum Kind : i64 { kFloat, kDouble, kInt, kLong, kBool };

// `OPERATIONS` in program.py.
enum Operation : u32 {
  kConstant, kInput, kOutput, kAdd, kSub, kMul, kDiv, kNeg, kSqrt, kAbs, kLog, kPower, kIntegerPower, kWhere, kLt, kLe,
  kGt, kGe, kEq, kNe, kAnd, kOr, kNot
};

struct Numbers {
  const i64* words;

  HOST_DEVICE double operator[](int place) const {
    const i64 address = words[3 * place], kind = words[3 * place + 1];
    const double value = bit_cast<double>(words[3 * place + 2]);
    if (address == 0) return value;
    switch (kind) {
      case kFloat: return value + static_cast<double>(*reinterpret_cast<const float*>(address));
      case kDouble: return value + *reinterpret_cast<const double*>(address);
      case kInt: return value + static_cast<double>(*reinterpret_cast<const int*>(address));
      case kLong: return value + static_cast<double>(*reinterpret_cast<const i64*>(address));
      default: return value + static_cast<double>(*reinterpret_cast<const u8*>(address));
    }
  }
};

// Where a row's numbers go, rounded once to the type of the row.
struct Out {
  i64 address;
  bool wide;

  HOST_DEVICE void set(u32 place, double value) const {
    if (wide) reinterpret_cast<double*>(address)[place] = value;
    else reinterpret_cast<float*>(address)[place] = static_cast<float>(value);
  }
};

// `coefficient` in fasttrain/optim/clip.py.
HOST_DEVICE double clip_coefficient(double norm, double largest) {
  const double scale = largest / (norm + 1e-6);
  return scale >= 1.0 ? 1.0 : scale;  // NaN stays NaN
}

// One row of the table: addresses of the program, of its words, of the row that is made, of its skip flag, and of the
// first slot (a slot's next is `rows` doubles behind, so that neighbouring threads share accesses); then flags: 1 for
// a row of doubles, 2 for one that ends with the numbers of `Tail` (fasttrain/kernels/item.py).
struct Prologue {
  static constexpr int columns = 6;

  // The program: the number of its words, the numbers of coefficients, then instructions of one word each, in eight and
  // four times fourteen bits: the operation, the slot of the result and those of the arguments. A constant's value is
  // the next word; an input's and an output's place stands in the place of the third argument.
  HOST_DEVICE static void run(const i64* program, const Numbers& inputs, double* slots, i64 stride, const Out& out) {
    const i64* const end = program + program[0];
    for (const i64* at = program + 2; at < end; ++at) {
      const u64 word = static_cast<u64>(*at);
      const auto field = [word](int i) { return static_cast<u32>(word >> (8 + 14 * i)) & 0x3FFFu; };
      const auto argument = [&](int i) { return slots[static_cast<i64>(field(i)) * stride]; };
      double result = 0.0;
      switch (static_cast<u32>(word) & 0xFFu) {
        case kConstant: result = bit_cast<double>(*++at); break;
        case kInput: result = inputs[static_cast<int>(field(3))]; break;
        case kOutput: out.set(1 + field(3), argument(1)); continue;
        case kAdd: result = argument(1) + argument(2); break;
        case kSub: result = argument(1) - argument(2); break;
        case kMul: result = argument(1) * argument(2); break;
        case kDiv: result = argument(1) / argument(2); break;
        case kNeg: result = -argument(1); break;
        case kSqrt: result = square_root(argument(1)); break;
        case kAbs: result = absolute(argument(1)); break;
        case kLog: result = logarithm(argument(1)); break;
        case kPower: result = power(argument(1), argument(2)); break;
        case kIntegerPower: result = integer_power(argument(1), argument(2)); break;
        case kWhere: result = argument(1) != 0.0 ? argument(2) : argument(3); break;
        case kLt: result = argument(1) < argument(2); break;
        case kLe: result = argument(1) <= argument(2); break;
        case kGt: result = argument(1) > argument(2); break;
        case kGe: result = argument(1) >= argument(2); break;
        case kEq: result = argument(1) == argument(2); break;
        case kNe: result = argument(1) != argument(2); break;
        case kAnd: result = argument(1) != 0.0 && argument(2) != 0.0; break;
        case kOr: result = argument(1) != 0.0 || argument(2) != 0.0; break;
        default: result = argument(1) == 0.0; break;  // kNot
      }
      slots[static_cast<i64>(field(0)) * stride] = result;
    }
  }

  HOST_DEVICE static void one(const i64* row, i64 rows) {
    const auto* program = reinterpret_cast<const i64*>(row[0]);
    const Numbers fixed{reinterpret_cast<const i64*>(row[1])};
    const Out out{row[2], (row[5] & 1) != 0};
    *reinterpret_cast<int*>(row[3]) = fixed[kFound] != 0.0;
    double scale = clip_coefficient(fixed[kNorm], fixed[kMaxNorm]) / fixed[kGradScale];
    scale = scale * clip_coefficient(absolute(scale) * square_root(fixed[kSquare]), fixed[kMaxEach]);
    out.set(0, scale * fixed[kScale]);
    run(program, Numbers{fixed.words + 3 * kFixed}, reinterpret_cast<double*>(row[4]), rows, out);
    if ((row[5] & 2) != 0) {
      const u32 width = 1 + static_cast<u32>(program[1]);
      const double keep = fixed[kEmaDecay];
      out.set(width, fixed[kClipValue]);
      out.set(width + 1, keep);
      out.set(width + 2, 1.0 - keep);
    }
  }

  HOST_DEVICE static void walk(const i64* table, i64 rows, const void*, Place place) {
    for (i64 row = static_cast<i64>(place.block) * place.threads + place.thread; row < rows;
         row += static_cast<i64>(place.blocks) * place.threads)
      one(table + row * columns, rows);
  }
};

}  // namespace FT_ISA
}  // namespace fasttrain

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
// The bound of one block lets it take the registers that it needs.
#define FT_PROLOGUE_KERNEL(Name)                                                                            \
  extern "C" __global__ void __launch_bounds__(64, 1) Name(const fasttrain::i64* table, fasttrain::i64 rows) { \
    using namespace fasttrain;                                                                              \
    Prologue::walk(table, rows, nullptr, Place{threadIdx.x, blockDim.x, blockIdx.x, gridDim.x});            \
  }
#ifndef FT_ON_DEMAND
FT_PROLOGUE_KERNEL(prologue)
#endif
#endif
