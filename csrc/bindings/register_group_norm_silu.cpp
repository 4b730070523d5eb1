#include <pybind11/stl.h>

#include <array>

#include "bindings/register.h"
#include "cpu/group_norm_silu.h"

namespace guda_fast::bindings {

void register_group_norm_silu(py::module_& module) {
  using Strides = std::array<std::int64_t, 2>;  // of rows, of positions
  module.def(
      "group_norm_silu",
      [](Address out, const Strides& out_strides, Address x, const Strides& x_strides,
         const std::string& dtype, std::int64_t rows, std::int64_t positions, std::int64_t channels,
         std::int64_t groups, Address weight, Address bias, std::int64_t models, Address model_index,
         Address addend, std::int64_t addend_stride, Address scale, std::int64_t scale_stride, Address shift,
         std::int64_t shift_stride, double eps, bool silu, int threads) {
        cpu::group_norm_silu({pointer<void>(out),
                              {out_strides[0], out_strides[1]},
                              pointer<const void>(x),
                              {x_strides[0], x_strides[1]},
                              dtype,
                              rows,
                              positions,
                              channels,
                              groups,
                              {pointer<const float>(weight), pointer<const float>(bias), models,
                               pointer<const std::int64_t>(model_index)},
                              {pointer<const float>(addend), addend_stride},
                              {pointer<const float>(scale), scale_stride},
                              {pointer<const float>(shift), shift_stride},
                              eps,
                              silu},
                             threads);
      },
      py::arg("out"), py::arg("out_strides"), py::arg("x"), py::arg("x_strides"), py::arg("dtype"),
      py::arg("rows"), py::arg("positions"), py::arg("channels"), py::arg("groups"), py::arg("weight"),
      py::arg("bias"), py::arg("models"), py::arg("model_index"), py::arg("addend"), py::arg("addend_stride"),
      py::arg("scale"), py::arg("scale_stride"), py::arg("shift"), py::arg("shift_stride"), py::arg("eps"),
      py::arg("silu"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace guda_fast::bindings
