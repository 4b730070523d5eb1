// The arguments of denoising_error, as every native backend takes and checks them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/rows.h"

namespace guda_fast {

struct Predictions {
  const void* data;
  std::vector<std::int64_t> strides;  // model, row, then those of the shape
  std::string dtype;                  // "float32", "bfloat16" or "float16"
  std::int64_t models;
};

struct DenoisingErrorCall {
  double* errors;
  double* paired;  // null: the differences to model 0 are not computed
  Predictions predictions;
  const float* x0;
  std::vector<std::int64_t> x0_strides;  // the query's, then those of the shape
  std::vector<std::int64_t> shape;
  Rows rows;
  const double* weight;
};

struct DenoisingErrorLayouts {
  Dtype dtype;
  Samples samples;
  Layout predictions;
};

DenoisingErrorLayouts checked(const DenoisingErrorCall& call);

}  // namespace guda_fast
