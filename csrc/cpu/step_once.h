// A step without a plan.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "cpu/reader.h"

namespace fasttrain {

// Steps tensors that are given one by one: tuples (rule, wide, tensors, counter or None, kept or None), one row of
// doubles for each; kept is (codecs, second arrays or Nones, zero, key, place) of an item that is not plain.
// What `Plan` keeps from step to step is done anew. Raises if a tensor cannot be taken.
void step_once(const Reader& reader, const py::list& items, const py::array_t<double, py::array::c_style>& rows,
               int threads);

}  // namespace fasttrain
