#include <cuda_runtime_api.h>

#include "cuda/device.h"

namespace guda_fast::cuda {

DeviceStatus device_status() {
  DeviceStatus status;
  const auto note = [&status](cudaError_t code) {
    if (code != cudaSuccess && status.error.empty()) status.error = cudaGetErrorString(code);
  };
  note(cudaRuntimeGetVersion(&status.runtime_version));
  note(cudaDriverGetVersion(&status.driver_version));
  note(cudaGetDeviceCount(&status.device_count));
  return status;
}

}  // namespace guda_fast::cuda
