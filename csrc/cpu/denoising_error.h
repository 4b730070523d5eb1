// errors[m, r] = weight[r] * sum of (predictions[m, r] - target[r])^2 with the target made on the fly.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/rows.h"

namespace guda_fast::cpu {

struct Predictions {
  const void* data;
  std::vector<std::int64_t> strides;  // model, row, then those of the shape
  std::string dtype;                  // "float32", "bfloat16" or "float16"
  std::int64_t models;
};

// `paired` may be null: then the differences to model 0 are not computed.
void denoising_error(double* errors, double* paired, const Predictions& predictions, const float* x0,
                     const std::vector<std::int64_t>& x0_strides, const std::vector<std::int64_t>& shape,
                     const Rows& rows, const double* weight, int threads);

}  // namespace guda_fast::cpu
