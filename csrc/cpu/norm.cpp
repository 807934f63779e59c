// The kernel of pass A: compiled once per instruction set, like step.cpp, and under the same rules.
#include "cpu/norm.h"

#include "codecs.h"
#include "cpu/fetch.h"
#include "cpu/lanes.h"

namespace fasttrain {
inline namespace FT_ISA {
namespace {

constexpr i64 kStaged = 512;      // elements converted at once
constexpr i64 kAhead = 3 * kStaged;  // elements between what is asked for and what is added

// Added to the bits of a number without its sign, this carries into the sign where the exponent is all ones: where the
// number is infinite or NaN. `Bits` are wide enough for a compiler to join the lanes as they are.
template <class Bits, Bits kOne>
bool any_nonfinite(const void* at, i64 begin, i64 n) {
  constexpr Bits kSign = static_cast<Bits>(Bits(1) << (8 * sizeof(Bits) - 1));
  const Bits* from = static_cast<const Bits*>(at) + begin;
  Bits carried = 0;
  for (i64 i = 0; i < n; ++i)
    carried = static_cast<Bits>(carried | static_cast<Bits>(static_cast<Bits>(from[i] & static_cast<Bits>(~kSign)) + kOne));
  return (carried & kSign) != 0;
}

double squares_of(const Stream& stream, i64 begin, i64 end, bool* nonfinite) {
  const void* at = stream.at;
  double blocks[kSumChunk / kSumBlock];
  alignas(64) float staged[kStaged];
  int count = 0;
  for (i64 block = begin; block < end; block += kSumBlock) {
    const i64 last = end - block < kSumBlock ? end : block + kSumBlock;
    double lanes[kLanes] = {};
    for (i64 from = block; from < last; from += kStaged) {
      const i64 n = last - from < kStaged ? last - from : kStaged;
      bool found = false;
      const i64 size = storage_bytes(stream.storage);
      if (from + kAhead + kStaged <= end) fetch(stream.at + (from + kAhead) * size, kStaged * size);
      switch (stream.storage) {  // one loop per storage, so that each vectorises
        case kF32:
          found = any_nonfinite<u32, 0x00800000u>(at, from, n);
          add_to_lanes<Square>(lanes, static_cast<const float*>(at) + from, n);
          break;
        case kF64:
          found = any_nonfinite<u64, 0x0010000000000000ull>(at, from, n);
          add_to_lanes<Square>(lanes, static_cast<const double*>(at) + from, n);
          break;
        case kBF16:
          found = any_nonfinite<u16, 0x0080>(at, from, n);
          for (i64 i = 0; i < n; ++i) staged[i] = load_element<float>(at, kBF16, from + i);
          add_to_lanes<Square>(lanes, staged, n);
          break;
        default:
          found = any_nonfinite<u16, 0x0400>(at, from, n);
          for (i64 i = 0; i < n; ++i) staged[i] = load_element<float>(at, kF16, from + i);
          add_to_lanes<Square>(lanes, staged, n);
          break;
      }
      *nonfinite |= found;
    }
    blocks[count++] = tree(lanes, kLanes);
  }
  return tree(blocks, count);
}

}  // namespace
}  // namespace FT_ISA

namespace FT_ISA {
extern const SquaresKernel squares;
const SquaresKernel squares = squares_of;
}  // namespace FT_ISA
}  // namespace fasttrain
