// What Python sees of the reductions: norms, steps with factored second moments, and stages.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

#include "cpu/norm.h"

namespace fasttrain {

// (one sum for each tensor, whether any element is infinite or NaN).
pybind11::tuple squares_as_python(const std::vector<Summed>& tensors, int threads);

void bind_reductions(pybind11::module_& m);

}  // namespace fasttrain
