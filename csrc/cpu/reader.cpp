#include "cpu/reader.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace fasttrain {
namespace {

py::object attribute(py::handle object, PyObject* name) {
  auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(object.ptr(), name));
  if (!found) throw py::error_already_set();
  return found;
}

// torch's version counter.
i64 version_of(py::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("_version");
  return attribute(tensor, name).cast<i64>();
}

// Whether two DTensors have their parts in the same places. Equal meshes that are not the same object are left to Python.
bool placed_alike(py::handle a, py::handle b) {
  static PyObject* const spec = PyUnicode_InternFromString("_spec");
  static PyObject* const mesh = PyUnicode_InternFromString("mesh");
  static PyObject* const placements = PyUnicode_InternFromString("placements");
  const py::object one = attribute(a, spec), other = attribute(b, spec);
  if (one.is(other)) return true;
  return attribute(one, mesh).is(attribute(other, mesh)) &&
         attribute(one, placements).equal(attribute(other, placements));
}

}  // namespace

Reader::Reader(const py::capsule& exchange, py::tuple types, py::object sharded)
    : types_(std::move(types)), sharded_(std::move(sharded)) {
  api_ = exchange.get_pointer<const dlpack::ExchangeApi>();
  is_neg_ = types_[0].attr("is_neg");
  ahead_ = Ahead(types_[0]());
  if (api_->major != dlpack::kMajor || api_->tensor_from_object == nullptr)
    throw std::runtime_error("this torch publishes DLPack " + std::to_string(api_->major) + "." +
                             std::to_string(api_->minor) + "; this build of fasttrain reads major version 1");
}

bool Reader::read_part(py::handle part, dlpack::Tensor* out) const {
  for (py::handle type : types_) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(part.ptr())) != type.ptr()) continue;
    if (api_->tensor_from_object(part.ptr(), out) != 0) {
      PyErr_Clear();  // sparse, or on a device that DLPack does not know: the caller says what is wrong with it
      return false;
    }
    if (out->data != nullptr) return true;
    for (int i = 0; i < out->ndim; ++i)  // no memory: nothing to point to, or freed under a tensor that is still there
      if (out->shape[i] == 0) return true;
    return false;
  }
  return false;
}

bool Reader::read(py::handle tensor, dlpack::Tensor* out) const { return read_part(part(tensor), out); }

py::object Reader::part(py::handle tensor) const {
  static PyObject* const name = PyUnicode_InternFromString("_local_tensor");
  return sharded(tensor) ? attribute(tensor, name) : py::reinterpret_borrow<py::object>(tensor);
}

py::object Reader::local(py::handle tensor) const { return sharded(tensor) ? part(tensor) : py::none(); }

i64 Reader::version(py::handle tensor) const {
  const py::object part = local(tensor);
  return version_of(tensor) + (part.is_none() ? 0 : version_of(part));
}

std::vector<i64> versions(const Reader& reader, const std::vector<py::object>& tensors) {
  std::vector<i64> found;
  for (const py::object& tensor : tensors) found.push_back(reader.version(tensor));
  return found;
}

bool Reader::placed(py::handle grad, py::handle param, py::object* known) const {
  if (sharded(grad) != sharded(param)) return false;
  if (!sharded(param)) return true;
  static PyObject* const name = PyUnicode_InternFromString("_spec");
  py::object spec = attribute(grad, name);
  if (spec.is(*known)) return true;
  if (!placed_alike(grad, param)) return false;
  *known = std::move(spec);
  return true;
}

bool Reader::negated(py::handle part) const {
  PyObject* arguments[] = {part.ptr()};
  const auto negated = py::reinterpret_steal<py::object>(PyObject_Vectorcall(is_neg_.ptr(), arguments, 1, nullptr));
  if (!negated) throw py::error_already_set();
  return negated.ptr() != Py_False;
}

bool Reader::read_gradient(py::handle tensor, py::handle param, dlpack::Tensor* out) const {
  py::object unknown;
  if (!placed(tensor, param, &unknown)) return false;
  const py::object own = part(tensor);
  return read_part(own, out) && !negated(own);
}

bool Kind::matches(const dlpack::Tensor& tensor) const {
  return dtype.code == tensor.dtype.code && dtype.bits == tensor.dtype.bits && dtype.lanes == tensor.dtype.lanes &&
         device.type == tensor.device.type && device.index == tensor.device.index;
}

int Kind::storage() const {
  if (dtype.lanes != 1) return -1;
  const int bits = complex() ? dtype.bits / 2 : dtype.bits;
  if (dtype.code == dlpack::kFloat || complex()) return bits == 32 ? kF32 : bits == 64 ? kF64 : bits == 16 ? kF16 : -1;
  return dtype.code == dlpack::kBfloat && bits == 16 ? kBF16 : -1;
}

Layout::Layout(const dlpack::Tensor& tensor)
    : sizes(tensor.shape, tensor.shape + tensor.ndim), strides(tensor.strides, tensor.strides + tensor.ndim) {}

bool Layout::matches(const dlpack::Tensor& tensor) const {
  if (static_cast<int>(sizes.size()) != tensor.ndim) return false;
  bool empty = false, same = true;  // where there is no element, any strides will do
  for (int i = 0; i < tensor.ndim; ++i) {
    if (sizes[i] != tensor.shape[i]) return false;
    empty |= sizes[i] == 0;
    same &= strides[i] == tensor.strides[i] || sizes[i] <= 1;
  }
  return same || empty;
}

void Layout::fetch() const {
  Ahead::lines(reinterpret_cast<const char*>(sizes.data()), 1);
  Ahead::lines(reinterpret_cast<const char*>(strides.data()), 1);
}

bool Layout::dense() const {
  std::vector<std::pair<i64, i64>> dims;  // stride, size
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return true;
    if (sizes[i] != 1) dims.emplace_back(strides[i], sizes[i]);
  }
  std::sort(dims.begin(), dims.end());
  i64 expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool Layout::contiguous() const {
  i64 expected = 1;
  bool same = true;
  for (size_t i = sizes.size(); i-- > 0;) {
    if (sizes[i] == 0) return true;
    same &= sizes[i] == 1 || strides[i] == expected;
    expected *= sizes[i];
  }
  return same;
}

i64 Layout::elements() const {
  i64 count = 1;
  for (i64 size : sizes) count *= size;
  return count;
}

}  // namespace fasttrain
