// The tensors of an optimizer on any device, compared on every step with what they were: nothing here reads or writes
// their elements, but for step counts in CPU memory. `fasttrain.optim.roster` has the same in Python.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <utility>
#include <tuple>
#include <vector>

#include "cpu/reader.h"
#include "cpu/walk.h"
#include "cpu/written.h"

namespace fasttrain {

class Roster {
 public:
  Roster(Reader reader, const std::vector<py::list>& groups);

  // Compares every parameter that has a gradient. Returns the indices of those that are not, or no longer, as they were
  // told, or None if the parameter lists themselves changed.
  py::object scan(py::dict state, const std::vector<py::list>& groups);

  // Compares one parameter again, whose gradient was replaced since. Whether it is as it was told.
  bool again(int index, py::dict state);

  // Takes a parameter as it is now, with its gradient and the entries `keys` of its state, of which the last is a step
  // count in CPU memory if `counted`. `fresh`: its state is new. `zero`: the step zeroes the gradient. `watched`: it is
  // not as it was if somebody else wrote it. False, and it is left out, if only Python knows what a tensor holds.
  bool set(int index, const py::dict& state, const py::tuple& keys, bool counted, bool fresh, bool zero, bool watched);

  // Of each parameter 1 if the last scan found a gradient and everything as it was told, else 0.
  py::bytes active() const;

  // Where the gradients of the active parameters lie.
  py::array_t<i64> addresses() const;

  // The distinct (group, step) of the active parameters in order of first use, where step is the count of the step to
  // come; and of each active parameter, which of them it has.
  std::pair<std::vector<std::tuple<int, double>>, py::array_t<i64>> rows() const;

  // The active parameters were stepped: counts their steps, and calls `increment` (increment_version of torch) with what
  // was written.
  void stepped(const py::function& increment);

  // Takes the versions of the watched ones among the active parameters.
  void remember();

  // The version of a watched parameter when it was last taken, or -1.
  i64 version(int index) const;

  // Lets go of the gradients of the last scan.
  void release();

 private:
  struct Held {
    py::object key, tensor, part;  // a DTensor's local part, or the tensor
    Kind kind;
    Layout layout;
    bool like = false;  // of the parameter's layout, which is in the cache
    char* at = nullptr;
  };
  struct Entry {
    py::object param, part, state;
    py::object placed;  // the placement of a gradient that was placed as the parameter
    std::vector<Held> held;
    Kind param_kind, grad_kind;
    Layout layout, grad_layout;
    char *at = nullptr, *grad = nullptr;
    Counter counter;
    i64 version = -1;
    int group = 0;
    bool ready = false, fresh = false, zero = false, watched = false, grad_like = false;
  };
  bool same(Entry& entry, py::handle grad, py::handle state) const;
  bool gradient(Entry& entry, py::handle grad, dlpack::Tensor* now) const;
  void fetch_ahead(size_t index) const;
  py::object gradient_of(size_t index) const;
  void fetch_gradients_ahead(size_t index);
  bool read(py::handle tensor, py::object* part, dlpack::Tensor* now) const;
  void take(size_t index, bool active, py::object grad);
  void list_written();

  Reader reader_;
  Ahead ahead_;
  std::vector<Entry> entries_;
  std::vector<size_t> group_sizes_;
  std::vector<u8> active_;
  std::vector<py::object> grads_;
  Written written_;  // by the active parameters
  bool listed_ = false;
};

}  // namespace fasttrain
