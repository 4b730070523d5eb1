#include <pybind11/stl.h>

#include "bindings/register.h"
#include "cpu/dispatch.h"
#include "guda_fast_build.h"

#if GUDA_FAST_WITH_CUDA
#include "cuda/device.h"
#endif

namespace guda_fast::bindings {
namespace {

py::dict build_config() {
  py::dict config;
  config["version"] = GUDA_FAST_VERSION;
  config["compiler"] = GUDA_FAST_COMPILER;
  config["flags"] = GUDA_FAST_FLAGS;
  config["instruction_sets"] = cpu::built_instruction_sets();
  config["openmp"] = py::bool_(GUDA_FAST_WITH_OPENMP != 0);
  config["cuda"] = py::bool_(GUDA_FAST_WITH_CUDA != 0);
  config["source_hash"] = GUDA_FAST_SOURCE_HASH;
  return config;
}

py::dict cuda_status() {
  py::dict result;
  result["compiled"] = py::bool_(GUDA_FAST_WITH_CUDA != 0);
#if GUDA_FAST_WITH_CUDA
  cuda::DeviceStatus status;
  {
    const py::gil_scoped_release release;
    status = cuda::device_status();
  }
  result["architectures"] = GUDA_FAST_CUDA_ARCHITECTURES;
  result["runtime_version"] = status.runtime_version;
  result["driver_version"] = status.driver_version;
  result["device_count"] = status.device_count;
  result["error"] = status.error;
#endif
  return result;
}

}  // namespace

void register_build(py::module_& module) {
  module.def("build_config", &build_config);
  module.def("cuda_status", &cuda_status);
  module.def("instruction_sets", &cpu::instruction_sets);
  module.def("instruction_set", [] { return std::string(cpu::kernels().name); });
  module.def("set_instruction_set", &cpu::set_instruction_set, py::arg("name"));
}

}  // namespace guda_fast::bindings
