#include "cpu/take.h"

namespace fasttrain {
namespace {

struct Type {
  dlpack::TypeCode code;
  int bits;
};

Type main_type(u8 codec) {
  switch (base_of(codec)) {
    case kF32: return {dlpack::kFloat, 32};
    case kF64: return {dlpack::kFloat, 64};
    case kF16: case kMasterF16: case kKahanF16: return {dlpack::kFloat, 16};
    case kInt8: case kInt4: return {(codec & kPositive) != 0 ? dlpack::kUInt : dlpack::kInt, 8};
    case kE4M3: return {dlpack::kFloat8E4M3, 8};
    case kE5M2: return {dlpack::kFloat8E5M2, 8};
    default: return {dlpack::kBfloat, 16};
  }
}

Type extra_type(u8 codec) {
  switch (base_of(codec)) {
    case kSplit16: return {dlpack::kInt, 16};
    case kSplit8: return {dlpack::kInt, 8};
    case kKahanBF16: return {dlpack::kBfloat, 16};
    case kKahanF16: return {dlpack::kFloat, 16};
    default: return {dlpack::kFloat, 32};
  }
}

// `flat`: the expected number of elements in row-major order, in any shape; -1: laid out like the parameter.
bool fits(const dlpack::Tensor& tensor, const Type& type, i64 flat, const Layout& param) {
  const dlpack::DataType& dtype = tensor.dtype;
  if (dtype.code != type.code || dtype.bits != type.bits || dtype.lanes != 1 || tensor.device.type != dlpack::kCPU)
    return false;
  if (flat < 0) return param.matches(tensor);
  const Layout layout(tensor);
  return layout.contiguous() && layout.elements() == flat;
}

}  // namespace

Counter::Type counter_type(const dlpack::Tensor& tensor) {
  const dlpack::DataType& type = tensor.dtype;
  if (Layout(tensor).elements() != 1 || tensor.device.type != dlpack::kCPU || type.lanes != 1) return Counter::kNone;
  if (type.code == dlpack::kFloat)
    return type.bits == 32 ? Counter::kFloat32 : type.bits == 64 ? Counter::kFloat64 : Counter::kNone;
  if (type.code == dlpack::kInt)
    return type.bits == 32 ? Counter::kInt32 : type.bits == 64 ? Counter::kInt64 : Counter::kNone;
  return Counter::kNone;
}

Counter counter_of(const Reader& reader, py::handle tensor) {
  dlpack::Tensor now;
  if (!reader.read(tensor, &now)) throw std::invalid_argument("the step count is not a plain tensor");
  const Counter counter{counter_type(now), address(now)};
  if (counter.type == Counter::kNone)
    throw std::invalid_argument("the step count must be one float or integer in CPU memory");
  return counter;
}

bool take(Work& work, int stream, const dlpack::Tensor& tensor, const Layout& layout, const Kind& param) {
  const Kind kind(tensor);
  if (kind.storage() < 0 || kind.complex() != param.complex() || kind.device.type != dlpack::kCPU ||
      !layout.matches(tensor))
    return false;
  work.streams[stream] = {address(tensor), static_cast<u8>(kind.storage())};
  return true;
}

void prepare(Work& work, const RuleKernels& rule, bool wide, const Layout& layout, const Kind& param) {
  work.rule = &rule;
  work.kept = nullptr;
  work.kernel = wide ? rule.wide : rule.narrow;
  work.elements = layout.elements() * (param.complex() ? 2 : 1);  // a complex number is two reals
}

void describe(Kept* kept, const RuleKernels& rule, bool wide, const std::vector<int>& codecs, bool zero,
              const std::tuple<i64, i64, i64>& place) {
  const int count = static_cast<int>(codecs.size());
  if (count != 2 + rule.states && count != 3 + rule.states)
    throw std::invalid_argument(std::string(rule.name) + " has p, g, " + std::to_string(rule.states) +
                                " states and perhaps an EMA; given are " + std::to_string(count) + " codecs");
  for (int o = 0; o < count; ++o) {
    const int codec = codecs[static_cast<size_t>(o)];
    const bool known = is_codec(codec) && (wide ? kept_kernels().wide_codecs[codec].load != nullptr
                                                : kept_kernels().codecs[codec].load != nullptr);
    if (!known || (o == 1 && codec >= kStorages))
      throw std::invalid_argument("operand " + std::to_string(o) + " cannot be kept by codec " + std::to_string(codec));
    kept->operands[o].codec = static_cast<u8>(codec);
  }
  kept->count = count;
  kept->zero = zero;
  std::tie(kept->first, kept->run, kept->pitch) = place;
  if (kept->first < 0 || kept->run < 0 || kept->pitch < 0)
    throw std::invalid_argument("a place is (first, run, pitch), none of them negative");
}

bool walkable(const Kept& kept, const Layout& param) {
  bool places_count = false;
  for (int o = 0; o < kept.count; ++o)
    places_count |= block_of(kept.operands[o].codec) != 0 || (kept.operands[o].codec & kStochastic) != 0;
  return places_count ? param.contiguous() : param.dense();
}

bool take_main(Kept& kept, int operand, const dlpack::Tensor& tensor, const Layout& param) {
  Operand& to = kept.operands[operand];
  const i64 flat = base_of(to.codec) == kInt4 ? main_bytes(to.codec, param.elements()) : -1;
  if (!fits(tensor, main_type(to.codec), flat, param)) return false;
  to.main = address(tensor);
  return true;
}

bool take_extra(Kept& kept, int operand, const dlpack::Tensor& tensor, const Layout& param) {
  Operand& to = kept.operands[operand];
  const i64 flat = block_of(to.codec) != 0 ? extra_elements(to.codec, param.elements()) : -1;
  if (!fits(tensor, extra_type(to.codec), flat, param)) return false;
  to.extra = address(tensor);
  return true;
}

}  // namespace fasttrain
