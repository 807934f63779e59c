// What Python sees of pack.h.
#pragma once
#include <pybind11/pybind11.h>

namespace fasttrain {

void bind_pack(pybind11::module_& m);

}  // namespace fasttrain
