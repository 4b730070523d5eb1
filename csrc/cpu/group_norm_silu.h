// Group norm over channels-last rows, with an addition before it and an affine map and SiLU after it.
#pragma once

#include <cstdint>
#include <string>

namespace guda_fast::cpu {

// (rows, positions, channels) elements; the channels of a position lie next to each other.
struct Activations {
  std::int64_t row_stride, position_stride;
};

// One vector of channels a row, or null.
struct RowVectors {
  const float* data;
  std::int64_t stride;
};

// The vectors of channels of all models, or null; row r takes model_index[r], or 0 where that is null.
struct Affine {
  const float* weight;
  const float* bias;
  std::int64_t models;
  const std::int64_t* model_index;
};

struct GroupNormSilu {
  void* out;
  Activations out_layout;
  const void* x;
  Activations x_layout;
  std::string dtype;  // "float32" or "bfloat16"
  std::int64_t rows, positions, channels, groups;
  Affine affine;
  RowVectors addend, scale, shift;
  double eps;
  bool silu;
};

void group_norm_silu(const GroupNormSilu& call, int threads);

}  // namespace guda_fast::cpu
