#include "cpu/reduce_bind.h"

#include <pybind11/numpy.h>

#include "cpu/factored.h"
#include "cpu/norm.h"
#include "cpu/stages.h"
#include "cpu/take.h"

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

Stream stream_of(const Reader& reader, py::handle tensor, i64 elements) {
  dlpack::Tensor now;
  if (!reader.read(tensor, &now)) throw std::invalid_argument("not a plain tensor");
  const Layout layout(now);
  const Kind kind(now);
  i64 expected = 1;  // contiguous: strides of dimensions of size 1 are free
  bool contiguous = true;
  for (int i = now.ndim - 1; i >= 0; --i) {
    contiguous &= now.shape[i] == 1 || now.strides[i] == expected;
    expected *= now.shape[i];
  }
  if (kind.storage() < 0 || kind.complex() || kind.device.type != dlpack::kCPU || layout.elements() != elements ||
      (elements != 0 && !contiguous))
    throw std::invalid_argument("tensors must be real, contiguous, in CPU memory and of the right size");
  return {static_cast<char*>(now.data) + now.byte_offset, static_cast<u8>(kind.storage())};
}

// `items` are tuples (p, g, (variance,) or (row_var, col_var), step count or None, wide); `rows` has for each the numbers
// that end `Factored`.
void step_factored_tensors(const Reader& reader, const py::list& items,
                           const py::array_t<double, py::array::c_style>& rows, int threads) {
  if (rows.ndim() != 2 || rows.shape(0) != static_cast<py::ssize_t>(items.size()) || (rows.shape(1) != 7 && !items.empty()))
    throw std::invalid_argument("seven numbers for each item are needed");
  std::vector<Factored> works;
  for (size_t i = 0; i < items.size(); ++i) {
    const auto item = items[i].cast<py::tuple>();
    Factored work{};
    dlpack::Tensor now;
    if (!reader.read(item[0], &now)) throw std::invalid_argument("not a plain tensor");
    work.whole = now.ndim < 2;
    for (int d = 0; d + 2 < now.ndim; ++d) work.matrices *= now.shape[d];
    if (!work.whole) work.rows = now.shape[now.ndim - 2];
    work.columns = now.ndim == 0 ? 1 : now.shape[now.ndim - 1];
    work.p = stream_of(reader, item[0], work.elements());
    work.g = stream_of(reader, item[1], work.elements());
    const auto states = item[2].cast<py::tuple>();
    if (work.whole) {
      work.variance = stream_of(reader, states[0], work.elements());
    } else {
      work.row_var = stream_of(reader, states[0], work.matrices * work.rows);
      work.column_var = stream_of(reader, states[1], work.matrices * work.columns);
    }
    if (!item[3].is_none()) work.counter = counter_of(reader, item[3]);
    work.wide = item[4].cast<bool>();
    const double* row = rows.data(static_cast<py::ssize_t>(i), 0);
    work.scale = row[0], work.keep = row[1], work.weight = row[2], work.rho = row[3];
    work.eps1 = row[4], work.eps2 = row[5], work.clip = row[6];
    works.push_back(work);
  }
  const py::gil_scoped_release release;
  step_factored(works, threads);
}

std::vector<std::pair<std::string, u32>> names_of_stages() {
  std::vector<std::pair<std::string, u32>> found;
  for (int i = 0; i < chosen_stages().count; ++i)
    found.emplace_back(chosen_stages().stages[i].name, chosen_stages().stages[i].digest);
  return found;
}

// `items` are tuples (stage, wide, tensors, step count or None); `rows` has a row for each as `step_once` takes it.
// Returns the sums of each item, padded with zeros.
py::array_t<double> run_stages(const Reader& reader, const py::list& items,
                               const py::array_t<double, py::array::c_style>& rows, int threads) {
  if (rows.ndim() != 2 || rows.shape(0) != static_cast<py::ssize_t>(items.size()))
    throw std::invalid_argument("one row of coefficients for each item is needed");
  std::vector<Staged> works(items.size());
  for (size_t i = 0; i < works.size(); ++i) {
    const auto item = items[i].cast<py::tuple>();
    const int number = item[0].cast<int>();
    if (number < 0 || number >= chosen_stages().count) throw std::out_of_range("no stage " + std::to_string(number));
    const StageKernels& stage = chosen_stages().stages[number];
    if (rows.shape(1) < 1 + stage.coefficients) throw std::invalid_argument("a stage has more coefficients than a row");
    const auto tensors = item[2].cast<py::tuple>();
    if (static_cast<int>(tensors.size()) != 2 + stage.states)
      throw std::invalid_argument(std::string(stage.name) + " has " + std::to_string(stage.states) + " states");
    works[i].stage = &stage;
    works[i].kernel = item[1].cast<bool>() ? stage.wide : stage.narrow;
    works[i].row = rows.data(static_cast<py::ssize_t>(i), 0);
    dlpack::Tensor now;
    Layout layout;
    for (int s = 0; s < 2 + stage.states; ++s) {
      if (!reader.read(tensors[static_cast<size_t>(s)], &now)) throw std::invalid_argument("not a plain tensor");
      const Kind kind(now);
      if (s == 0) layout = Layout(now);
      if (kind.storage() < 0 || kind.complex() || kind.device.type != dlpack::kCPU || !layout.dense() ||
          !layout.matches(now))
        throw std::invalid_argument("tensors must be real, dense, in CPU memory, of one order");
      works[i].streams[s] = {static_cast<char*>(now.data) + now.byte_offset, static_cast<u8>(kind.storage())};
    }
    works[i].elements = layout.elements();
    if (!item[3].is_none()) works[i].counter = counter_of(reader, item[3]);
  }
  py::array_t<double> sums({static_cast<py::ssize_t>(works.size()), static_cast<py::ssize_t>(kMaxSums)});
  double* to = sums.mutable_data();
  const py::gil_scoped_release release;
  run_stages(works, to, threads);
  return sums;
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
  m.def("stages", &names_of_stages, "Name and digest of the compiled stages, in order.");
  m.def("run_stages", py::overload_cast<const Reader&, const py::list&, const py::array_t<double, py::array::c_style>&, int>(&run_stages),
        "Run stages of optimizers with reductions; returns their sums.");
  m.def("step_factored", &step_factored_tensors, "Step tensors with factored second moments.");
}

}  // namespace fasttrain
