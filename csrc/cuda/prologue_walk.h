// The prologue of captured steps, compiled for the host.
#pragma once
#include <pybind11/pybind11.h>

namespace fasttrain {

void bind_prologue(pybind11::module_& m);

}  // namespace fasttrain
