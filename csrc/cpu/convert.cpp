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
  if (!reader.read(main, &now) || !take_main(c.kept, 0, now, layout) || extra.is_none() != (extra_size(c.kept.operands[0].codec) == 0) ||
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

}  // namespace fasttrain
