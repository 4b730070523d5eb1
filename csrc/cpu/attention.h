// Softmax attention with few dimensions a head.
#pragma once

#include <cstdint>
#include <string>

namespace guda_fast::cpu {

// (rows, heads, positions, dim) elements; those of a position lie next to each other.
struct Heads {
  std::int64_t row_stride, head_stride, position_stride;
};

struct Attention {
  void* out;
  Heads out_layout;
  const void* q;
  Heads q_layout;
  const void* k;
  Heads k_layout;
  const void* v;
  Heads v_layout;
  std::string dtype;  // "float32" or "bfloat16"
  std::int64_t rows, heads, queries, keys, dim;
  double scale;
};

// out = softmax(scale q k^T) v for each row and head.
void attention(const Attention& call, int threads);

}  // namespace guda_fast::cpu
