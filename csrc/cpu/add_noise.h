// out[r] = x0_scale[r] * x0[query_index[r]] + eps_scale[r] * eps(seed, query_id[r], timestep[r], sample[r])
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/layout.h"
#include "cpu/rows.h"

namespace guda_fast::cpu {

// The samples that rows refer to. Strides begin with the query's.
struct Samples {
  const float* x0;
  std::int64_t query_stride;
  Layout layout;
  std::int64_t elements;
};

Samples checked_samples(const char* op, const float* x0, const std::vector<std::int64_t>& x0_strides,
                        const std::vector<std::int64_t>& shape, const Rows& rows);

// The noised (or target) elements of one chunk of one row, contiguous.
void noised_chunk(const Kernels& kernels, float* out, const Samples& samples, const Rows& rows,
                  std::int64_t row, std::int64_t start, std::int64_t elements);

void add_noise(float* out, const std::vector<std::int64_t>& out_strides, const float* x0,
               const std::vector<std::int64_t>& x0_strides, const std::vector<std::int64_t>& shape,
               const Rows& rows, int threads);

void noise_words(std::uint32_t* out, std::int64_t blocks, std::int64_t first_block, std::int64_t query_id,
                 std::int64_t timestep, std::int64_t sample, std::uint64_t seed);

}  // namespace guda_fast::cpu
