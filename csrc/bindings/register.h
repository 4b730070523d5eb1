// Each function adds one op's calls to the module. Pointers come as integers, strides in elements.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace guda_fast::bindings {

namespace py = pybind11;

void register_add_noise(py::module_& module);
void register_attention(py::module_& module);
void register_conv3x3(py::module_& module);
void register_denoising_error(py::module_& module);
void register_group_norm_silu(py::module_& module);
void register_build(py::module_& module);

using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace guda_fast::bindings
