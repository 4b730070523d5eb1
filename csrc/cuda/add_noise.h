// out[r] = x0_scale[r] x0[query_index[r]] + eps_scale[r] eps(seed, query_id[r], timestep[r], sample[r])
#pragma once

#include <cstdint>

#include "common/add_noise.h"

namespace guda_fast::cuda {

// All pointers are the device's. `stream` is a cudaStream_t; the call returns before the kernel has run.
// Indices are not checked: reading them would wait for the device.
void add_noise(const AddNoiseCall& call, int device, std::uintptr_t stream);

}  // namespace guda_fast::cuda
