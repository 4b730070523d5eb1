#include "bindings/register.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of guda_fast. Callers pass pointers as integers and own the memory.";
  guda_fast::bindings::register_add_noise(module);
  guda_fast::bindings::register_attention(module);
  guda_fast::bindings::register_conv3x3(module);
  guda_fast::bindings::register_denoising_error(module);
  guda_fast::bindings::register_group_norm_silu(module);
  guda_fast::bindings::register_build(module);
}
