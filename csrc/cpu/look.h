// What every comparison of an optimizer's tensors does: looking up states, and comparing a tensor with its parameter.
#pragma once
#include <pybind11/pybind11.h>

#include "dlpack.h"

namespace fasttrain {

namespace py = pybind11;

inline PyObject* look_up(py::handle dict, py::handle key) {
  PyObject* value = PyDict_GetItemWithError(dict.ptr(), key.ptr());
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;  // borrowed, or nullptr
}

// States are made in the order of the parameters, most often: walking the dict beside them saves a hash each.
class Beside {
 public:
  explicit Beside(py::handle dict) : dict_(dict) { advance(); }

  PyObject* find(py::handle key) {
    if (!more_ || next_ != key.ptr()) return look_up(dict_, key);
    PyObject* found = value_;
    advance();
    return found;
  }

 private:
  void advance() { more_ = PyDict_Next(dict_.ptr(), &position_, &next_, &value_) != 0; }

  py::handle dict_;
  Py_ssize_t position_ = 0;
  PyObject *next_ = nullptr, *value_ = nullptr;
  bool more_ = false;
};

// Whether g or a state, read just after its parameter, has the parameter's sizes and strides.
inline bool alike(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  if (a.ndim != b.ndim) return false;
  bool empty = false, same = true;  // where there is no element, any strides will do
  for (int i = 0; i < a.ndim; ++i) {
    if (a.shape[i] != b.shape[i]) return false;
    empty |= a.shape[i] == 0;
    same &= a.strides[i] == b.strides[i] || a.shape[i] <= 1;
  }
  return same || empty;
}

}  // namespace fasttrain
