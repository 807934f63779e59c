#include "cpu/reduce_bind.h"

#include "cpu/norm.h"
#include "cpu/plan.h"

namespace fasttrain {
namespace {

// (sum of squares of each tensor, whether any element is infinite or NaN, indices of the tensors that were left out
// because they are no dense tensors in CPU memory).
py::tuple squares_of_tensors(const Reader& reader, const py::list& tensors, int threads) {
  std::vector<Summed> summed;
  py::list left;
  size_t i = 0;
  for (py::handle tensor : tensors) {
    dlpack::Tensor now;
    Summed found{};
    if (reader.read(tensor, &now)) {
      const Layout layout(now);
      const Kind kind(now);
      if (kind.storage() >= 0 && kind.device.type == dlpack::kCPU && layout.dense())
        found = {{static_cast<char*>(now.data) + now.byte_offset, static_cast<u8>(kind.storage())},
                 layout.elements() * (kind.complex() ? 2 : 1)};
      else
        left.append(i);
    } else {
      left.append(i);
    }
    summed.push_back(found);
    ++i;
  }
  const py::tuple sums = squares_as_python(summed, threads);
  return py::make_tuple(sums[0], sums[1], left);
}

}  // namespace

py::tuple squares_as_python(const std::vector<Summed>& tensors, int threads) {
  py::array_t<double> sums(static_cast<py::ssize_t>(tensors.size()));
  double* to = sums.mutable_data();
  bool nonfinite = false;
  {
    const py::gil_scoped_release release;
    nonfinite = sum_squares(tensors, to, threads);
  }
  return py::make_tuple(sums, nonfinite);
}

void bind_reductions(py::module_& m) {
  m.def("squares", &squares_of_tensors, "Sums of squares of tensors.");
}

}  // namespace fasttrain
