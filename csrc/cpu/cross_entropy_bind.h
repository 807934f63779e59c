// What Python sees of cross_entropy.h.
#pragma once
#include <pybind11/pybind11.h>

namespace fasttrain {

void bind_cross_entropy(pybind11::module_& m);

}  // namespace fasttrain
