// Softmax attention of one (row, head) pair, for the instruction set of the including file.
// Every query is a lane of its own: maxima and sums need no step across lanes, and no result depends on which other
// queries are in the call.
#pragma once

#include "cpu/activation.h"

namespace guda_fast::cpu::GUDA_FAST_SET {

// 2^t for t < 126; 0 below -126, whose powers are no normal numbers. Minimax polynomials on [-0.5, 0.5]: relative
// error 1.6e-8, or 2.9e-6 where the result is rounded to bfloat16, half of whose spacing is 2^-9.
template <Dtype dtype>
GUDA_FAST_INLINE VecF exp2(VecF t) {
  const VecF n = nearest(t);
  const VecF f = t - n;
  VecF p;
  if constexpr (dtype == Dtype::float32) {
    p = mul_add(f, VecF{} + 1.53533619e-4f, VecF{} + 1.33988744e-3f);
    p = mul_add(f, p, VecF{} + 9.61843736e-3f);
    p = mul_add(f, p, VecF{} + 5.55033247e-2f);
    p = mul_add(f, p, VecF{} + 2.40226479e-1f);
    p = mul_add(f, p, VecF{} + 6.93147203e-1f);
  } else {
    p = mul_add(f, VecF{} + 9.58285304e-3f, VecF{} + 5.59064247e-2f);
    p = mul_add(f, p, VecF{} + 2.40240986e-1f);
    p = mul_add(f, p, VecF{} + 6.93124193e-1f);
  }
  return zero_where_less(scale_by_power(mul_add(f, p, VecF{} + 1.0f), n), t, VecF{} - 126.0f);
}

// to[block][d][i] = from[kKeyBlock block + i][d] in float32, and zeros behind the last row.
template <Dtype dtype>
void pack_keys(float* to, const void* source, std::int64_t stride, std::int64_t rows, std::int64_t dim) {
  using T = typename Activation<dtype>::Type;
  const T* from = static_cast<const T*>(source);
  for (std::int64_t first = 0; first < rows; first += kKeyBlock, to += kKeyBlock * dim) {
    for (std::int64_t i = 0; i < kKeyBlock; ++i) {
      const T* row = from + (first + i) * stride;
      const bool present = first + i < rows;
      for (std::int64_t d = 0; d < dim; ++d) {
        to[d * kKeyBlock + i] = present ? Activation<dtype>::to_float(row[d]) : 0.0f;
      }
    }
  }
}

// What a tile of kWidth queries knows of the keys so far: the sums of p and p v, with p = 2^(score - reference).
struct Running {
  VecF reference, sum;
};

// Above this the reference follows the scores. Powers up to 2^16 lose no digit, and seldom does a block of scores
// exceed those before by more: nearly no block pays for new powers of the old sums.
constexpr float kSlack = 16.0f;

template <Dtype dtype>
GUDA_FAST_INLINE void raise_reference(Running* running, VecF* total, VecF most, std::int64_t dim) {
  const VecI above = most > running->reference + kSlack;
  const VecI chosen = (reinterpret_cast<VecI>(most) & above) | (reinterpret_cast<VecI>(running->reference) & ~above);
  const VecF raised = reinterpret_cast<VecF>(chosen);
  const VecF factor = exp2<dtype>(running->reference - raised);
  running->reference = raised;
  running->sum = running->sum * factor;
  for (std::int64_t d = 0; d < dim; ++d) total[d] = total[d] * factor;
}

// One block of keys, `used` of which are there. queries and total: a vector each dimension.
template <Dtype dtype>
GUDA_FAST_INLINE void add_keys(Running* running, VecF* total, const VecF* queries, const float* k, const float* v,
                               std::int64_t used, std::int64_t dim) {
  VecF p[kKeyBlock];
#pragma GCC unroll 8
  for (int i = 0; i < kKeyBlock; ++i) p[i] = VecF{};
#pragma GCC unroll 8
  for (std::int64_t d = 0; d < dim; ++d) {
#pragma GCC unroll 8
    for (int i = 0; i < kKeyBlock; ++i) p[i] = mul_add(queries[d], VecF{} + k[d * kKeyBlock + i], p[i]);
  }
  for (std::int64_t i = used; i < kKeyBlock; ++i) p[i] = VecF{} - __builtin_inff();
  const VecF most = max(max(max(p[0], p[1]), max(p[2], p[3])), max(max(p[4], p[5]), max(p[6], p[7])));
  if (any_greater(most, running->reference + kSlack)) raise_reference<dtype>(running, total, most, dim);
#pragma GCC unroll 8
  for (int i = 0; i < kKeyBlock; ++i) p[i] = exp2<dtype>(p[i] - running->reference);
  running->sum = running->sum + (((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7])));
#pragma GCC unroll 8
  for (std::int64_t d = 0; d < dim; ++d) {
    // The block's own sum first: its chain is short, and so is that of the blocks.
    VecF own = p[0] * (VecF{} + v[d * kKeyBlock]);
#pragma GCC unroll 8
    for (int i = 1; i < kKeyBlock; ++i) own = mul_add(p[i], VecF{} + v[d * kKeyBlock + i], own);
    total[d] = total[d] + own;
  }
}

// A tile of up to kWidth queries.
template <Dtype dtype, int fixed_dim>
void attend_tile(const AttentionTile& tile, std::int64_t first, std::int64_t queries) {
  using T = typename Activation<dtype>::Type;
  const std::int64_t dim = fixed_dim != 0 ? fixed_dim : tile.dim;
  const T* q = static_cast<const T*>(tile.q) + first * tile.q_stride;
  float *lanes = tile.scratch, *sums = lanes + kWidth * dim;
  std::memset(lanes, 0, static_cast<std::size_t>(kWidth * dim) * sizeof(float));
  for (std::int64_t i = 0; i < queries; ++i) {
    for (std::int64_t d = 0; d < dim; ++d) {
      lanes[d * kWidth + i] = static_cast<float>(Activation<dtype>::to_float(q[i * tile.q_stride + d]) * tile.factor);
    }
  }
  Running running = {VecF{} - 0x1.fffffep127f, VecF{}};
  VecF own[fixed_dim != 0 ? 2 * fixed_dim : 1];
  VecF* vectors = fixed_dim != 0 ? own : reinterpret_cast<VecF*>(tile.scratch);
  VecF* total = vectors + dim;
  if constexpr (fixed_dim != 0) {
#pragma GCC unroll 16
    for (int d = 0; d < fixed_dim; ++d) vectors[d] = load<VecF>(lanes + d * kWidth);
  }
#pragma GCC unroll 16
  for (std::int64_t d = 0; d < dim; ++d) total[d] = VecF{};
  const float *k = tile.k, *v = tile.v;
  for (std::int64_t left = tile.keys; left > 0; left -= kKeyBlock) {
    add_keys<dtype>(&running, total, vectors, k, v, left < kKeyBlock ? left : kKeyBlock, dim);
    k += kKeyBlock * dim;
    v += kKeyBlock * dim;
  }
  const VecF share = 1.0f / running.sum;
  T* results = reinterpret_cast<T*>(lanes);
  for (std::int64_t d = 0; d < dim; ++d) Activation<dtype>::write(results + d * kWidth, total[d] * share);
  T* out = static_cast<T*>(tile.out) + first * tile.out_stride;
  for (std::int64_t i = 0; i < queries; ++i) {
    for (std::int64_t d = 0; d < dim; ++d) out[i * tile.out_stride + d] = results[d * kWidth + i];
  }
  static_cast<void>(sums);
}

template <Dtype dtype>
void attend(const AttentionTile& tile) {
  for (std::int64_t first = 0; first < tile.queries; first += kWidth) {
    const std::int64_t left = tile.queries - first;
    const std::int64_t queries = left < kWidth ? left : kWidth;
    if (tile.dim == 8) {
      attend_tile<dtype, 8>(tile, first, queries);
    } else {
      attend_tile<dtype, 0>(tile, first, queries);
    }
  }
}

#define GUDA_FAST_INSTANTIATE(dtype)                                                                       \
  template void pack_keys<dtype>(float*, const void*, std::int64_t, std::int64_t, std::int64_t); \
  template void attend<dtype>(const AttentionTile&);
GUDA_FAST_INSTANTIATE(Dtype::float32)
GUDA_FAST_INSTANTIATE(Dtype::bfloat16)
#undef GUDA_FAST_INSTANTIATE

}  // namespace guda_fast::cpu::GUDA_FAST_SET
