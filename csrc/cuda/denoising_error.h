// errors[m, r] = weight[r] * sum of (predictions[m, r] - target[r])^2 with the target made on the fly.
#pragma once

#include <cstdint>

#include "common/denoising_error.h"

namespace guda_fast::cuda {

// Float64 values for the sums of chunks: nothing is allocated in the call, which a CUDA graph may capture.
struct Workspace {
  double* data;
  std::int64_t size;
};

// How many a call needs; 0 where rows have at most one chunk.
std::int64_t denoising_error_workspace(std::int64_t models, std::int64_t rows, std::int64_t elements,
                                       bool paired);

// All pointers are the device's. `stream` is a cudaStream_t; the call returns before the kernels have run.
// Indices are not checked: reading them would wait for the device.
void denoising_error(const DenoisingErrorCall& call, const Workspace& workspace, int device,
                     std::uintptr_t stream);

}  // namespace guda_fast::cuda
