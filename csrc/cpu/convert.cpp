#include "cpu/convert.h"

#include <algorithm>

#include "cpu/take.h"
#include "cpu/threads.h"

namespace fasttrain {
namespace {

struct Conversion {
  Kept kept;
  const Codec<float>* codec;
  float* values;
  i64 elements;
};

// The elements of a contiguous tensor of 32-bit elements.
char* words_of(const Reader& reader, py::handle tensor, dlpack::TypeCode code, Layout* layout) {
  dlpack::Tensor now;
  if (!reader.read(tensor, &now) || now.dtype.code != code || now.dtype.bits != 32 || now.device.type != dlpack::kCPU)
    throw std::invalid_argument("values are fp32 and draws int32, in CPU memory");
  *layout = Layout(now);
  if (!layout->contiguous()) throw std::invalid_argument("values and draws must be contiguous");
  return address(now);
}

Conversion prepare(const Reader& reader, int codec, py::handle main, py::handle extra, py::handle values) {
  Conversion c;
  if (!is_codec(codec) || codec == kF64) throw std::invalid_argument("no codec " + std::to_string(codec) + " of fp32");
  c.kept.operands[0].codec = static_cast<u8>(codec);
  c.codec = &kept_kernels().codecs[codec];
  Layout layout;
  c.values = reinterpret_cast<float*>(words_of(reader, values, dlpack::kFloat, &layout));
  c.elements = layout.elements();
  dlpack::Tensor now;
  const bool alone = extra_size(c.kept.operands[0].codec) == 0;
  if (!reader.read(main, &now) || !take_main(c.kept, 0, now, layout) || extra.is_none() != alone ||
      (!extra.is_none() && (!reader.read(extra, &now) || !take_extra(c.kept, 0, now, layout))))
    throw std::invalid_argument("these are not the arrays of codec " + std::to_string(codec));
  return c;
}

}  // namespace

void encode(const Reader& reader, int codec, py::handle values, py::handle main, py::handle extra, py::handle draws) {
  const Conversion c = prepare(reader, codec, main, extra, values);
  const u32* drawn = nullptr;
  if ((codec & kStochastic) != 0) {
    Layout layout;
    drawn = reinterpret_cast<const u32*>(words_of(reader, draws, dlpack::kInt, &layout));
    if (layout.elements() != c.elements) throw std::invalid_argument("as many draws as values are needed");
  }
  const py::gil_scoped_release release;
  const FloatingPointMode mode;
  float inverse[kPiece / 128];
  for (i64 from = 0; from < c.elements; from += kPiece) {
    const i64 n = std::min(kPiece, c.elements - from);
    if (c.codec->measure != nullptr) c.codec->measure(c.kept.operands[0], from, n, c.values + from, inverse);
    c.codec->store(c.kept.operands[0], from, n, c.values + from, inverse, drawn == nullptr ? nullptr : drawn + from);
  }
}

void decode(const Reader& reader, int codec, py::handle main, py::handle extra, py::handle values) {
  const Conversion c = prepare(reader, codec, main, extra, values);
  const py::gil_scoped_release release;
  const FloatingPointMode mode;
  for (i64 from = 0; from < c.elements; from += kPiece)
    c.codec->load(c.kept.operands[0], from, std::min(kPiece, c.elements - from), c.values + from);
}

i64 count_broken_splits(int codec, u32 first, u32 last) {
  if (codec != kSplit16 && codec != kSplit8) throw std::invalid_argument("not the codec of a split");
  const Codec<float>& split = kept_kernels().codecs[codec];
  alignas(64) u32 bits[kPiece], back[kPiece];
  alignas(64) unsigned short main[kPiece], extra[kPiece];
  const Operand operand{reinterpret_cast<char*>(main), reinterpret_cast<char*>(extra), static_cast<u8>(codec)};
  i64 broken = 0;
  const py::gil_scoped_release release;
  for (u64 from = first; from <= last; from += kPiece) {
    const i64 n = std::min<i64>(kPiece, static_cast<i64>(last - from + 1));
    for (i64 i = 0; i < n; ++i) bits[i] = static_cast<u32>(from) + static_cast<u32>(i);
    split.store(operand, 0, n, reinterpret_cast<const float*>(bits), nullptr, nullptr);
    split.load(operand, 0, n, reinterpret_cast<float*>(back));
    int wrong = 0;
    for (i64 i = 0; i < n; ++i) {
      const int magnitude = static_cast<int>(bits[i] & 0x7FFFFFFFu), kept = static_cast<int>(back[i] & 0x7FFFFFFFu);
      const int lost = magnitude > kept ? magnitude - kept : kept - magnitude;
      // In units of the last place; those above the last number of 24 bits become it.
      const int half = magnitude == 0x7F800000 ? 0 : magnitude >= 0x7F7FFF80 ? 0xFF : 0x80;
      const int allowed = codec == kSplit16 ? 0 : half;
      const bool nan = magnitude > 0x7F800000;
      const bool finite = (magnitude < 0x7F800000) == (kept < 0x7F800000);
      const bool right = (bits[i] >> 31 == back[i] >> 31) & (lost <= allowed) & finite;
      const bool still_nan = (kept > 0x7F800000) & ((main[i] & 0x7FFF) > 0x7F80);
      wrong += nan ? !still_nan : !right;
    }
    broken += wrong;
  }
  return broken;
}

}  // namespace fasttrain
