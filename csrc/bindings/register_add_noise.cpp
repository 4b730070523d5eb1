#include <pybind11/stl.h>

#include "bindings/register.h"
#include "bindings/rows.h"
#include "cpu/add_noise.h"
#include "guda_fast_build.h"

#if GUDA_FAST_WITH_CUDA
#include "cuda/add_noise.h"
#endif

namespace guda_fast::bindings {

#if GUDA_FAST_WITH_CUDA
static void register_cuda(py::module_& module) {
  module.def(
      "cuda_add_noise",
      [](Address out, const std::vector<std::int64_t>& out_strides, Address x0,
         const std::vector<std::int64_t>& x0_strides, const std::vector<std::int64_t>& shape,
         std::int64_t queries, std::int64_t rows, Address query_index, Address query_id, Address timestep,
         Address sample, Address x0_scale, Address eps_scale, std::uint64_t seed, bool antithetic, int device,
         Address stream) {
        cuda::add_noise({pointer<float>(out), out_strides, pointer<const float>(x0), x0_strides, shape,
                         make_rows(rows, queries, query_index, query_id, timestep, sample, x0_scale,
                                   eps_scale, seed, antithetic)},
                        device, stream);
      },
      py::arg("out"), py::arg("out_strides"), py::arg("x0"), py::arg("x0_strides"), py::arg("shape"),
      py::arg("queries"), py::arg("rows"), py::arg("query_index"), py::arg("query_id"), py::arg("timestep"),
      py::arg("sample"), py::arg("x0_scale"), py::arg("eps_scale"), py::arg("seed"), py::arg("antithetic"),
      py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}
#endif

void register_add_noise(py::module_& module) {
  module.def(
      "add_noise",
      [](Address out, const std::vector<std::int64_t>& out_strides, Address x0,
         const std::vector<std::int64_t>& x0_strides, const std::vector<std::int64_t>& shape,
         std::int64_t queries, std::int64_t rows, Address query_index, Address query_id, Address timestep,
         Address sample, Address x0_scale, Address eps_scale, std::uint64_t seed, bool antithetic,
         int threads) {
        cpu::add_noise({pointer<float>(out), out_strides, pointer<const float>(x0), x0_strides, shape,
                        make_rows(rows, queries, query_index, query_id, timestep, sample, x0_scale, eps_scale,
                                  seed, antithetic)},
                       threads);
      },
      py::arg("out"), py::arg("out_strides"), py::arg("x0"), py::arg("x0_strides"), py::arg("shape"),
      py::arg("queries"), py::arg("rows"), py::arg("query_index"), py::arg("query_id"), py::arg("timestep"),
      py::arg("sample"), py::arg("x0_scale"), py::arg("eps_scale"), py::arg("seed"), py::arg("antithetic"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());
#if GUDA_FAST_WITH_CUDA
  register_cuda(module);
#endif
  module.def(
      "noise_words",
      [](Address out, std::int64_t blocks, std::int64_t first_block, std::int64_t query_id,
         std::int64_t timestep, std::int64_t sample, std::uint64_t seed) {
        cpu::noise_words(pointer<std::uint32_t>(out), blocks, first_block, query_id, timestep, sample, seed);
      },
      py::arg("out"), py::arg("blocks"), py::arg("first_block"), py::arg("query_id"), py::arg("timestep"),
      py::arg("sample"), py::arg("seed"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace guda_fast::bindings
