// The arguments of add_noise, as every native backend takes and checks them.
#pragma once

#include <cstdint>
#include <vector>

#include "common/rows.h"

namespace guda_fast {

struct AddNoiseCall {
  float* out;
  std::vector<std::int64_t> out_strides;  // the row's, then those of the shape
  const float* x0;
  std::vector<std::int64_t> x0_strides;  // the query's, then those of the shape
  std::vector<std::int64_t> shape;
  Rows rows;
};

struct AddNoiseLayouts {
  Samples samples;
  Layout out;
};

AddNoiseLayouts checked(const AddNoiseCall& call);

}  // namespace guda_fast
