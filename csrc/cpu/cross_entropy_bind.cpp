#include "cpu/cross_entropy_bind.h"

#include "cpu/cross_entropy.h"
#include "cpu/take.h"

namespace fasttrain {
namespace {

constexpr i64 kBrief = 1 << 14;  // logits below which others may wait for the interpreter, and other threads sleep

// A tensor of shape (groups, rows, columns) whose columns are neighbours in memory.
LogitRows rows_of(const Reader& reader, py::handle tensor) {
  dlpack::Tensor now;
  if (!reader.read(tensor, &now)) throw std::invalid_argument("not a plain tensor");
  const Kind kind(now);
  if (now.ndim != 3 || kind.device.type != dlpack::kCPU || kind.complex() || kind.storage() < 0 ||
      kind.storage() == kF64 || (now.shape[2] > 1 && now.strides[2] != 1))
    throw std::invalid_argument("logits must be of shape (groups, rows, classes), fp32, bf16 or fp16, in CPU memory");
  return {address(now), static_cast<u8>(kind.storage()), now.shape[0], now.shape[1], now.shape[2], now.strides[0],
          now.strides[1]};
}

// A contiguous tensor in CPU memory of so many elements, of one of the sizes in bytes.
char* flat(const Reader& reader, py::handle tensor, dlpack::TypeCode code, int bits, i64 elements) {
  dlpack::Tensor now;
  if (!reader.read(tensor, &now)) throw std::invalid_argument("not a plain tensor");
  const Layout layout(now);
  if (now.device.type != dlpack::kCPU || now.dtype.code != code || now.dtype.bits != bits || now.dtype.lanes != 1 ||
      !layout.contiguous() || layout.elements() != elements)
    throw std::invalid_argument("a tensor beside the logits is not contiguous, or of another dtype or size than it must");
  return address(now);
}

Targets targets_of(const Reader& reader, py::handle tensor, i64 rows) {
  dlpack::Tensor now;
  if (!reader.read(tensor, &now)) throw std::invalid_argument("not a plain tensor");
  const bool byte = now.dtype.code == dlpack::kUInt;
  const int bits = byte ? 8 : now.dtype.bits == 32 ? 32 : 64;
  return {flat(reader, tensor, byte ? dlpack::kUInt : dlpack::kInt, bits, rows), bits / 8};
}

EntropyTerms terms_of(const py::tuple& terms) {
  return {terms[0].cast<i64>(), terms[1].cast<i64>(), terms[2].cast<i64>(), terms[3].cast<double>(),
          terms[4].cast<double>()};
}

// Calls `work` with as many threads as are of use.
template <class Work>
void without_lock(const LogitRows& logits, int threads, const Work& work) {
  if (logits.count() * logits.columns <= kBrief) return work(1);
  const py::gil_scoped_release release;
  work(threads);
}

// `terms`: the fields of EntropyTerms. `losses` and `z` may be None. Returns the fields of EntropyTotals.
py::tuple measure(const Reader& reader, py::handle logits, py::handle targets, const py::tuple& terms, py::handle parts,
                  py::handle losses, py::handle z, int threads) {
  const LogitRows rows = rows_of(reader, logits);
  const i64 count = rows.count();
  const auto floats = [&](py::handle tensor, i64 n) {
    return reinterpret_cast<float*>(tensor.is_none() ? nullptr : flat(reader, tensor, dlpack::kFloat, 32, n));
  };
  const Targets classes = targets_of(reader, targets, count);
  const EntropyTerms stated = terms_of(terms);
  float *part = floats(parts, kParts * count), *loss = floats(losses, count), *extra = floats(z, count);
  if (parts.is_none() || losses.is_none() != z.is_none())
    throw std::invalid_argument("parts, and losses with their z terms or neither, are written");
  if (!losses.is_none() && (stated.first != 0 || stated.vocabulary != rows.columns))
    throw std::invalid_argument("losses need the logits of all classes");
  EntropyTotals totals;
  without_lock(rows, threads, [&](int n) { totals = measure_rows(rows, classes, stated, part, loss, extra, n); });
  return py::make_tuple(totals.wrong_row, totals.count, totals.correct, totals.loss, totals.z);
}

void differentiate(const Reader& reader, py::handle logits, py::handle targets, const py::tuple& terms, py::handle parts,
                   py::handle scales, py::handle to, int threads) {
  const LogitRows rows = rows_of(reader, logits), into = rows_of(reader, to);
  if (into.count() != rows.count() || into.columns != rows.columns || into.storage != rows.storage)
    throw std::invalid_argument("the derivative must have as many rows as the logits, their classes and their dtype");
  const i64 count = rows.count();
  const Targets classes = targets_of(reader, targets, count);
  const EntropyTerms stated = terms_of(terms);
  const auto part = reinterpret_cast<const float*>(flat(reader, parts, dlpack::kFloat, 32, kParts * count));
  const bool one = py::len(scales) == 1;
  const auto scale = reinterpret_cast<const float*>(flat(reader, scales, dlpack::kFloat, 32, one ? 1 : count));
  without_lock(rows, threads, [&](int n) { differentiate_rows(rows, classes, stated, part, scale, one, into, n); });
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
  m.def("cross_entropy_measure", &measure, "One pass over logits: what the loss of each row is made of.");
  m.def("cross_entropy_differentiate", &differentiate, "The derivative of a cross-entropy by the logits.");
}

}  // namespace fasttrain
