// out[r] = x0_scale[r] * x0[query_index[r]] + eps_scale[r] * eps(seed, query_id[r], timestep[r], sample[r])
#pragma once

#include <cstdint>

#include "common/add_noise.h"
#include "cpu/rows.h"

namespace guda_fast::cpu {

// The noised (or target) elements of one chunk of one row, contiguous.
void noised_chunk(const Kernels& kernels, float* out, const Samples& samples, const Rows& rows,
                  std::int64_t row, std::int64_t start, std::int64_t elements);

void add_noise(const AddNoiseCall& call, int threads);

void noise_words(std::uint32_t* out, std::int64_t blocks, std::int64_t first_block, std::int64_t query_id,
                 std::int64_t timestep, std::int64_t sample, std::uint64_t seed);

}  // namespace guda_fast::cpu
