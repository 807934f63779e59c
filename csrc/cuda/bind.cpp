#include "cuda/bind.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/driver.h"
#include "cuda/host_walk.h"

namespace fasttrain {
namespace {

namespace py = pybind11;

std::vector<std::string> kernels() {
  std::vector<std::string> names;
  for (int i = 0; i < host_kernel_count; ++i) names.emplace_back(host_kernels[i].name);
  return names;
}

const HostKernel& find(const std::string& name) {
  for (int i = 0; i < host_kernel_count; ++i)
    if (name == host_kernels[i].name) return host_kernels[i];
  throw std::invalid_argument("no kernel is called " + name + "; cuda_kernels() lists them");
}

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

// Walks a kernel on the host, block by block in the given order and thread by thread. Returns the number of 16-byte
// accesses and of single ones.
std::pair<i64, i64> host_walk(const std::string& name, const py::array& table, const py::array& rows, u32 blocks,
                              u32 threads, const std::vector<u32>& order,
                              const std::optional<py::array_t<i64, py::array::c_style>>& gradients) {
  const HostKernel& kernel = find(name);
  require(py::isinstance<py::array_t<i64>>(table) && table.ndim() == 2 && table.shape(1) == kernel.columns &&
              (table.flags() & py::array::c_style) != 0,
          "the table of " + name + " is a contiguous int64 array of " + std::to_string(kernel.columns) + " columns");
  require(kernel.coefficients == 0 ||
              ((kernel.wide ? py::isinstance<py::array_t<double>>(rows) : py::isinstance<py::array_t<float>>(rows)) &&
               rows.ndim() == 2 && rows.shape(1) == kernel.coefficients && (rows.flags() & py::array::c_style) != 0),
          "the coefficients of " + name + " are a contiguous array of " + (kernel.wide ? "float64" : "float32") +
              " with " + std::to_string(kernel.coefficients) + " columns");
  require(!gradients || gradients->size() == table.shape(0),
          "gradients of " + name + " are one address for each row of its table");
  accesses = Accesses();
  const auto* words = static_cast<const i64*>(table.data());
  for (u32 block : order)
    for (u32 thread = 0; thread < threads; ++thread)
      kernel.walk(words, table.shape(0), rows.data(), gradients ? gradients->data() : nullptr, thread, threads, block,
                  blocks);
  return {accesses.wide, accesses.narrow};
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_kernels", &kernels, "Names of the kernels that step.fatbin holds.");
  m.def("cuda_host_walk", &host_walk, "Run a kernel's own text on the host.", py::arg("name"), py::arg("table"),
        py::arg("rows"), py::arg("blocks"), py::arg("threads"), py::arg("order"), py::arg("gradients") = py::none());
  py::class_<DeviceCode>(m, "DeviceCode")
      .def("usage", [](DeviceCode& code, const std::string& kernel, int threads) {
        const DeviceCode::Usage usage = code.usage(kernel, threads);
        return py::dict(py::arg("registers") = usage.registers, py::arg("local_bytes") = usage.local_bytes,
                        py::arg("blocks") = usage.blocks);
      })
      .def("launch", &DeviceCode::launch, py::call_guard<py::gil_scoped_release>(), py::arg("kernel"), py::arg("blocks"),
           py::arg("threads"), py::arg("stream"), py::arg("table"), py::arg("chunks"), py::arg("rows"),
           py::arg("gradients") = 0);
  py::class_<Driver, std::shared_ptr<Driver>>(m, "Driver")
      .def(py::init<const std::string&>())
      .def("version", &Driver::version)
      .def("capability", &Driver::capability)
      .def("multiprocessors", &Driver::multiprocessors)
      .def("load", [](const std::shared_ptr<Driver>& driver, const py::bytes& image, int device) {
        return std::make_unique<DeviceCode>(driver, image, device);
      });
}

}  // namespace fasttrain
