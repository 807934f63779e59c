// What Python sees of the CUDA backend.
#pragma once
#include <pybind11/pybind11.h>

namespace fasttrain {

void bind_cuda(pybind11::module_& m);

}  // namespace fasttrain
