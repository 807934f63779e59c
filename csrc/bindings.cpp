// What Python sees: one line per feature, no logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/bandwidth.h"
#include "cpu/convert.h"
#include "cpu/cross_entropy_bind.h"
#include "cpu/on_demand.h"
#include "cpu/pack_bind.h"
#include "cpu/plan.h"
#include "cpu/reduce_bind.h"
#include "cpu/roster.h"
#include "cpu/step_once.h"
#include "cpu/threads.h"
#include "cuda/bind.h"
#include "step.h"

namespace py = pybind11;
using namespace fasttrain;

namespace {

std::vector<std::pair<std::string, u32>> rules() {
  std::vector<std::pair<std::string, u32>> found;
  for (int i = 0; i < chosen_kernels().count; ++i)
    found.emplace_back(chosen_kernels().rules[i].name, chosen_kernels().rules[i].digest);
  return found;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "fasttrain's compiled kernels: no torch header, one build for every torch version.";
  m.def("isa", [] { return chosen_kernels().isa; }, "The instruction set in use.");
  m.def("threading", &threading, "Whose threads the CPU walk runs on.");
  m.def("rules", &rules, "Name and digest of the compiled rules, in order.");
  m.def("headers", &headers, "Hash of the headers that this build was made with.");
  m.def("load_rule", &load_rule, "Load a rule that was compiled on demand; returns its number.");
  py::class_<Reader>(m, "Reader").def(py::init<const py::capsule&, py::tuple, py::object>(), py::arg("exchange"),
                                  py::arg("types"), py::arg("sharded") = py::none());
  py::class_<Plan>(m, "Plan")
      .def(py::init<Reader, const std::vector<py::list>&>())
      .def("scan", &Plan::scan)
      .def("set", &Plan::set, py::arg("index"), py::arg("rule"), py::arg("wide"), py::arg("state"), py::arg("keys"),
           py::arg("counted"), py::arg("fresh"), py::arg("kept") = py::none(), py::arg("running") = py::tuple())
      .def("rows", &Plan::rows, py::arg("each") = false)
      .def("run", &Plan::run, py::arg("rows"), py::arg("keys"), py::arg("threads"), py::arg("increment"),
           py::arg("replaced") = std::vector<py::tuple>())
      .def("release", &Plan::release)
      .def("squares", &Plan::squares)
      .def("version", &Plan::version)
      .def_property_readonly("last", &Plan::last);
  py::class_<Roster>(m, "Roster")
      .def(py::init<Reader, const std::vector<py::list>&>())
      .def("scan", &Roster::scan)
      .def("again", &Roster::again)
      .def("set", &Roster::set, py::arg("index"), py::arg("state"), py::arg("keys"), py::arg("counted") = false,
           py::arg("fresh") = false, py::arg("zero") = false, py::arg("watched") = false)
      .def("active", &Roster::active)
      .def("addresses", &Roster::addresses)
      .def("rows", &Roster::rows)
      .def("stepped", &Roster::stepped)
      .def("remember", &Roster::remember)
      .def("version", &Roster::version)
      .def("release", &Roster::release);
  py::class_<Listed>(m, "Written")
      .def(py::init<Reader, const std::vector<py::object>&>())
      .def("increment", &Listed::increment);
  m.def("versions", &versions, "What changes whenever a tensor is written through torch, of each.");
  m.def("update_streams", &update_streams, py::call_guard<py::gil_scoped_release>(), "The ceiling of a CPU step.");
  m.def("step_once", &step_once, "Step tensors that are given one by one.");
  bind_reductions(m);
  bind_pack(m);
  bind_cross_entropy(m);
  m.def("encode", &encode, "Write fp32 values into the arrays of one codec.");
  m.def("decode", &decode, "Read the arrays of one codec into fp32 values.");
  m.def("count_broken_splits", &count_broken_splits, "Sweep the fp32 numbers that are split and put together again.");
  bind_cuda(m);
}
