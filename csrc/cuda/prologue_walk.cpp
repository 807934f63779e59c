// The prologue's own text, compiled for the host, so that tests run it where there is no GPU.
#include "cuda/prologue_walk.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cuda/prologue.cuh"

namespace fasttrain {
namespace {

namespace py = pybind11;

struct HostPrologue {
  const char* name;
  int numbers, width;
  void (*narrow)(const i64*, i64, float*, int*, bool, i64, i64);
  void (*wide)(const i64*, i64, double*, int*, bool, i64, i64);
};

#define FT_HOST_PROLOGUE(Name)                                                                      \
  {#Name, Prologue<Name, float>::numbers, Prologue<Name, float>::width, Prologue<Name, float>::walk, \
   Prologue<Name, double>::walk},
const HostPrologue prologues[] = {FASTTRAIN_COEFFICIENTS(FT_HOST_PROLOGUE)};

template <class T>
py::tuple run(const HostPrologue& prologue, void (*walk)(const i64*, i64, T*, int*, bool, i64, i64),
              const py::array_t<i64, py::array::c_style>& words, bool kept) {
  const py::ssize_t rows = words.shape(0);
  py::array_t<T> out({rows, static_cast<py::ssize_t>(prologue.width + (kept ? 3 : 0))});
  py::array_t<int> skip(rows);
  constexpr i64 threads = 7;
  for (i64 thread = threads; thread-- > 0;)
    walk(words.data(), rows, out.mutable_data(), skip.mutable_data(), kept, thread, threads);
  return py::make_tuple(out, skip);
}

py::tuple host_prologue(const std::string& name, const py::array_t<i64, py::array::c_style>& words, bool wide, bool kept) {
  for (const HostPrologue& prologue : prologues) {
    if (name != prologue.name) continue;
    if (words.ndim() != 2 || words.shape(1) != 3 * prologue.numbers)
      throw std::invalid_argument("the words of " + name + " have " + std::to_string(3 * prologue.numbers) + " columns");
    return wide ? run(prologue, prologue.wide, words, kept) : run(prologue, prologue.narrow, words, kept);
  }
  throw std::invalid_argument("no coefficients are called " + name + "; cuda_prologues() lists them");
}

std::vector<std::string> names() {
  std::vector<std::string> found;
  for (const HostPrologue& prologue : prologues) found.emplace_back(prologue.name);
  return found;
}

}  // namespace

void bind_prologue(py::module_& m) {
  m.def("cuda_prologues", &names, "Names of the computations of coefficients that are compiled.");
  m.def("cuda_host_prologue", &host_prologue, "Run a prologue's own text on the host; returns rows and skip flags.",
        py::arg("name"), py::arg("words"), py::arg("wide"), py::arg("kept"));
}

}  // namespace fasttrain
