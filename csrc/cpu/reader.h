// What the plan knows of a torch tensor: where its elements are, of what type, in which order.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>  // here, so that no file casts without it

#include <vector>

#include "common.h"
#include "cpu/ahead.h"
#include "dlpack.h"

namespace fasttrain {

namespace py = pybind11;

// Reads tensors of the exact types `types` through `torch.Tensor.__dlpack_c_exchange_api__`; and, if `sharded` is torch's
// DTensor and not None, the local part of such.
class Reader {
 public:
  Reader(const py::capsule& exchange, py::tuple types, py::object sharded);
  // False if only Python knows what the tensor holds: it is a subclass, or has no strided elements in memory.
  bool read(py::handle tensor, dlpack::Tensor* out) const;
  // The same for a gradient. Autograd may leave one that is to be negated when it is read (of an imaginary part, say).
  // A local part is the gradient only if it is placed as its parameter is.
  bool read_gradient(py::handle tensor, py::handle param, dlpack::Tensor* out) const;
  // The same in steps, for who keeps what it finds: the tensor whose memory it is, the local part of a DTensor; whether
  // it can be read; whether it is to be negated; and whether a gradient is placed as its parameter is, for which `known`
  // is the placement (`_spec`) that was found to be so before.
  py::object part(py::handle tensor) const;
  bool read_part(py::handle part, dlpack::Tensor* out) const;
  bool negated(py::handle part) const;
  bool placed(py::handle grad, py::handle param, py::object* known) const;
  // The local part of a DTensor, or None.
  py::object local(py::handle tensor) const;
  // What changes whenever the elements of a tensor are written through torch, through the whole or the local part.
  i64 version(py::handle tensor) const;
  const Ahead& ahead() const { return ahead_; }

 private:
  const dlpack::ExchangeApi* api_;
  bool sharded(py::handle tensor) const { return reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr())) == sharded_.ptr(); }

  py::tuple types_;
  py::object sharded_;
  py::object is_neg_;
  Ahead ahead_;
};

std::vector<i64> versions(const Reader& reader, const std::vector<py::object>& tensors);

// Type and place of a tensor's elements.
struct Kind {
  dlpack::DataType dtype{};
  dlpack::Device device{};

  Kind() = default;
  explicit Kind(const dlpack::Tensor& tensor) : dtype(tensor.dtype), device(tensor.device) {}
  bool matches(const dlpack::Tensor& tensor) const;
  bool complex() const { return dtype.code == dlpack::kComplex; }
  int storage() const;  // Storage, or -1
};

// Sizes and strides of a parameter when it was described; its gradient and states have the same.
struct Layout {
  std::vector<i64> sizes, strides;

  Layout() = default;
  explicit Layout(const dlpack::Tensor& tensor);
  bool matches(const dlpack::Tensor& tensor) const;  // strides of dimensions of size 1 are free
  bool dense() const;                                // fills one stretch of memory, in some order of its dimensions
  bool contiguous() const;                           // in row-major order
  i64 elements() const;
  void fetch() const;  // into the cache
};

}  // namespace fasttrain
