#include <pybind11/stl.h>

#include <array>

#include "bindings/register.h"
#include "cpu/conv3x3.h"

namespace guda_fast::bindings {

void register_conv3x3(py::module_& module) {
  using Strides = std::array<std::int64_t, 3>;  // of rows, of height, of width
  module.def(
      "conv3x3",
      [](Address out, const Strides& out_strides, Address x, const Strides& x_strides, Address weight,
         Address bias, std::int64_t rows, std::int64_t height, std::int64_t width, std::int64_t inputs,
         std::int64_t outputs, int threads) {
        const auto layout = [](const Strides& strides) {
          return cpu::Maps{strides[0], strides[1], strides[2]};
        };
        cpu::conv3x3(
            {pointer<float>(out), layout(out_strides), pointer<const float>(x), layout(x_strides),
             pointer<const float>(weight), pointer<const float>(bias), rows, height, width, inputs, outputs},
            threads);
      },
      py::arg("out"), py::arg("out_strides"), py::arg("x"), py::arg("x_strides"), py::arg("weight"),
      py::arg("bias"), py::arg("rows"), py::arg("height"), py::arg("width"), py::arg("inputs"),
      py::arg("outputs"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace guda_fast::bindings
