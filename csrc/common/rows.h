// The rows of a call: which query is noised how, with which noise. What every backend checks of them.
#pragma once

#include <cstdint>
#include <vector>

#include "common/layout.h"

namespace guda_fast {

struct Rows {
  std::int64_t rows;
  std::int64_t queries;
  const std::int64_t* query_index;
  const std::int64_t* query_id;  // the bits of the unsigned id
  const std::int64_t* timestep;
  const std::int64_t* sample;
  const float* x0_scale;
  const float* eps_scale;
  std::uint64_t seed;
  bool antithetic;
};

// The samples that rows refer to. Strides begin with the query's.
struct Samples {
  const float* x0;
  std::int64_t query_stride;
  Layout layout;
  std::int64_t elements;
};

// Checks counts, pointers and strides, and reads no row: the memory may be a device's.
Samples checked_samples(const char* op, const float* x0, const std::vector<std::int64_t>& x0_strides,
                        const std::vector<std::int64_t>& shape, const Rows& rows);

}  // namespace guda_fast
