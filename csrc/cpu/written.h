// Tensors that a step writes, whose versions autograd compares.
#pragma once
#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "cpu/reader.h"

namespace fasttrain {

class Written {
 public:
  void clear() { blocks_.clear(), parameters_ = 0; }
  // Those of another parameter follow.
  void next() {
    if (parameters_++ % kBlock == 0) blocks_.emplace_back();
  }
  // Autograd may have saved a whole DTensor, or its local part.
  void add(py::handle tensor, const Reader& reader) {
    blocks_.back().append(tensor);
    const py::object part = reader.local(tensor);
    if (!part.is_none()) blocks_.back().append(part);
  }
  // Calls torch.autograd.graph.increment_version with block after block. What it is going to touch is fetched in three
  // steps, each of which touches what the one before it fetched.
  void increment(const Ahead& ahead, const py::function& increment_version) const {
    for (size_t block = 0; block < blocks_.size(); ++block) {
      const auto each = [&](size_t distance, const auto& fetch) {
        if (block + distance < blocks_.size())
          for (py::handle tensor : blocks_[block + distance]) fetch(tensor);
      };
      each(3, [&](py::handle tensor) { ahead.object(tensor); });
      each(2, [&](py::handle tensor) { ahead.tensor(tensor); });
      each(1, [&](py::handle tensor) { ahead.inside(tensor); });
      increment_version(blocks_[block]);
    }
  }

 private:
  static constexpr size_t kBlock = 16;  // parameters whose versions are incremented together
  std::vector<py::list> blocks_;
  size_t parameters_ = 0;
};

// What steps that are no plan's write, listed once.
class Listed {
 public:
  Listed(Reader reader, const std::vector<py::object>& tensors) : reader_(std::move(reader)) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (i % kEach == 0) written_.next();
      written_.add(tensors[i], reader_);
    }
  }
  void increment(const py::function& increment_version) const { written_.increment(reader_.ahead(), increment_version); }

 private:
  static constexpr size_t kEach = 4;  // tensors of a parameter, about
  Reader reader_;
  Written written_;
};

}  // namespace fasttrain
