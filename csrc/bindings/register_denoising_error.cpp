#include <pybind11/stl.h>

#include "bindings/register.h"
#include "bindings/rows.h"
#include "cpu/denoising_error.h"
#include "guda_fast_build.h"

#if GUDA_FAST_WITH_CUDA
#include "cuda/denoising_error.h"
#endif

namespace guda_fast::bindings {

#if GUDA_FAST_WITH_CUDA
static void register_cuda(py::module_& module) {
  module.def(
      "cuda_denoising_error",
      [](Address errors, Address paired, Address predictions,
         const std::vector<std::int64_t>& prediction_strides, const std::string& dtype, std::int64_t models,
         Address x0, const std::vector<std::int64_t>& x0_strides, const std::vector<std::int64_t>& shape,
         std::int64_t queries, std::int64_t rows, Address query_index, Address query_id, Address timestep,
         Address sample, Address x0_scale, Address eps_scale, Address weight, std::uint64_t seed,
         bool antithetic, Address workspace, std::int64_t workspace_size, int device, Address stream) {
        cuda::denoising_error({pointer<double>(errors),
                               pointer<double>(paired),
                               {pointer<const void>(predictions), prediction_strides, dtype, models},
                               pointer<const float>(x0),
                               x0_strides,
                               shape,
                               make_rows(rows, queries, query_index, query_id, timestep, sample, x0_scale,
                                         eps_scale, seed, antithetic),
                               pointer<const double>(weight)},
                              {pointer<double>(workspace), workspace_size}, device, stream);
      },
      py::arg("errors"), py::arg("paired"), py::arg("predictions"), py::arg("prediction_strides"),
      py::arg("dtype"), py::arg("models"), py::arg("x0"), py::arg("x0_strides"), py::arg("shape"),
      py::arg("queries"), py::arg("rows"), py::arg("query_index"), py::arg("query_id"), py::arg("timestep"),
      py::arg("sample"), py::arg("x0_scale"), py::arg("eps_scale"), py::arg("weight"), py::arg("seed"),
      py::arg("antithetic"), py::arg("workspace"), py::arg("workspace_size"), py::arg("device"),
      py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  module.def("cuda_denoising_error_workspace", &cuda::denoising_error_workspace, py::arg("models"),
             py::arg("rows"), py::arg("elements"), py::arg("paired"));
}
#endif

void register_denoising_error(py::module_& module) {
  module.def(
      "denoising_error",
      [](Address errors, Address paired, Address predictions,
         const std::vector<std::int64_t>& prediction_strides, const std::string& dtype, std::int64_t models,
         Address x0, const std::vector<std::int64_t>& x0_strides, const std::vector<std::int64_t>& shape,
         std::int64_t queries, std::int64_t rows, Address query_index, Address query_id, Address timestep,
         Address sample, Address x0_scale, Address eps_scale, Address weight, std::uint64_t seed,
         bool antithetic, int threads) {
        cpu::denoising_error({pointer<double>(errors),
                              pointer<double>(paired),
                              {pointer<const void>(predictions), prediction_strides, dtype, models},
                              pointer<const float>(x0),
                              x0_strides,
                              shape,
                              make_rows(rows, queries, query_index, query_id, timestep, sample, x0_scale,
                                        eps_scale, seed, antithetic),
                              pointer<const double>(weight)},
                             threads);
      },
      py::arg("errors"), py::arg("paired"), py::arg("predictions"), py::arg("prediction_strides"),
      py::arg("dtype"), py::arg("models"), py::arg("x0"), py::arg("x0_strides"), py::arg("shape"),
      py::arg("queries"), py::arg("rows"), py::arg("query_index"), py::arg("query_id"), py::arg("timestep"),
      py::arg("sample"), py::arg("x0_scale"), py::arg("eps_scale"), py::arg("weight"), py::arg("seed"),
      py::arg("antithetic"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
#if GUDA_FAST_WITH_CUDA
  register_cuda(module);
#endif
}

}  // namespace guda_fast::bindings
