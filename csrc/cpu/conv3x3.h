// 3x3 convolution of stride 1 that keeps height and width, over channels-last rows.
#pragma once

#include <cstdint>

namespace guda_fast::cpu {

// (rows, height, width, channels) elements; the channels of a position lie next to each other.
struct Maps {
  std::int64_t row_stride, height_stride, width_stride;
};

struct Conv3x3 {
  float* out;
  Maps out_layout;
  const float* x;
  Maps x_layout;
  const float* weight;  // (outputs, 3, 3, inputs)
  const float* bias;    // or null
  std::int64_t rows, height, width, inputs, outputs;
};

void conv3x3(const Conv3x3& call, int threads);

}  // namespace guda_fast::cpu
