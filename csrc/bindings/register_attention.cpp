#include <pybind11/stl.h>

#include <array>

#include "bindings/register.h"
#include "cpu/attention.h"

namespace guda_fast::bindings {

void register_attention(py::module_& module) {
  using Strides = std::array<std::int64_t, 3>;  // of rows, of heads, of positions
  module.def(
      "attention",
      [](Address out, const Strides& out_strides, Address q, const Strides& q_strides, Address k,
         const Strides& k_strides, Address v, const Strides& v_strides, const std::string& dtype,
         std::int64_t rows, std::int64_t heads, std::int64_t queries, std::int64_t keys, std::int64_t dim,
         double scale, int threads) {
        const auto layout = [](const Strides& strides) {
          return cpu::Heads{strides[0], strides[1], strides[2]};
        };
        cpu::attention({pointer<void>(out), layout(out_strides), pointer<const void>(q), layout(q_strides),
                        pointer<const void>(k), layout(k_strides), pointer<const void>(v), layout(v_strides),
                        dtype, rows, heads, queries, keys, dim, scale},
                       threads);
      },
      py::arg("out"), py::arg("out_strides"), py::arg("q"), py::arg("q_strides"), py::arg("k"),
      py::arg("k_strides"), py::arg("v"), py::arg("v_strides"), py::arg("dtype"), py::arg("rows"),
      py::arg("heads"), py::arg("queries"), py::arg("keys"), py::arg("dim"), py::arg("scale"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace guda_fast::bindings
