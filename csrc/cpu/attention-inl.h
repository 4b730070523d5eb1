// Softmax attention of one (row, head) pair, for the instruction set of the including file.
// Every query is a lane of its own: maxima and sums need no step across lanes, and no result depends on which
// other queries are in the call.
#pragma once

#include "cpu/activation.h"

namespace guda_fast::cpu::GUDA_FAST_SET {

// 2^t for t < 126, or nan; 0 below -126, whose powers are no normal numbers. Minimax polynomials on
// [-0.5, 0.5]: relative error 1.6e-8, or 2.9e-6 where the result is rounded to bfloat16, half of whose
// spacing is 2^-9.
template <Dtype dtype>
GUDA_FAST_INLINE VecF exp2(VecF t) {
  const VecF n = nearest(t);
  const VecF f = t - n;
  VecF p;
  if constexpr (dtype == Dtype::float32) {
    p = mul_add(f, splat(1.53533619e-4f), splat(1.33988744e-3f));
    p = mul_add(f, p, splat(9.61843736e-3f));
    p = mul_add(f, p, splat(5.55033247e-2f));
    p = mul_add(f, p, splat(2.40226479e-1f));
    p = mul_add(f, p, splat(6.93147203e-1f));
  } else {
    p = mul_add(f, splat(9.58285304e-3f), splat(5.59064247e-2f));
    p = mul_add(f, p, splat(2.40240986e-1f));
    p = mul_add(f, p, splat(6.93124193e-1f));
  }
  return zero_where_less(scale_by_any_power(mul_add(f, p, splat(1.0f)), n), t, splat(-126.0f));
}

// to[d][i] = from[i][d], four by four where that goes.
template <Dtype dtype>
GUDA_FAST_INLINE void read_columns(float* to, std::int64_t to_stride,
                                   const typename Activation<dtype>::Type* from, std::int64_t stride,
                                   std::int64_t rows, std::int64_t dim) {
  for (std::int64_t d = 0; d < dim; d += 4) {
    std::int64_t i = 0;
    for (; d + 4 <= dim && i + 4 <= rows; i += 4) {
      Quad block[4];
      for (int row = 0; row < 4; ++row)
        block[row] = Activation<dtype>::read_quad(from + (i + row) * stride + d);
      transpose(block);
      for (int column = 0; column < 4; ++column) store(to + (d + column) * to_stride + i, block[column]);
    }
    for (; i < rows; ++i) {
      for (std::int64_t e = d; e < d + 4 && e < dim; ++e) {
        to[e * to_stride + i] = Activation<dtype>::to_float(from[i * stride + e]);
      }
    }
  }
}

// to[i][d] = from[d][i], the inverse. Reads up to three vectors behind the last one.
template <Dtype dtype>
GUDA_FAST_INLINE void write_rows(typename Activation<dtype>::Type* to, std::int64_t stride, const float* from,
                                 std::int64_t rows, std::int64_t dim) {
  using T = typename Activation<dtype>::Type;
  for (std::int64_t i = 0; i < rows; i += 4) {
    for (std::int64_t d = 0; d < dim; d += 4) {
      Quad block[4];
      for (int row = 0; row < 4; ++row) block[row] = load<Quad>(from + (d + row) * kWidth + i);
      transpose(block);
      for (std::int64_t row = 0; row < 4 && i + row < rows; ++row) {
        T* at = to + (i + row) * stride + d;
        if (d + 4 <= dim) {
          Activation<dtype>::write_quad(at, block[row]);
        } else {
          T few[4];
          Activation<dtype>::write_quad(few, block[row]);
          std::memcpy(at, few, static_cast<std::size_t>(dim - d) * sizeof(T));
        }
      }
    }
  }
}

template <Dtype dtype>
void pack_keys(float* to, const void* from, std::int64_t stride, std::int64_t rows, std::int64_t dim) {
  using T = typename Activation<dtype>::Type;
  const T* row = static_cast<const T*>(from);
  for (; rows >= kKeyBlock; rows -= kKeyBlock, row += kKeyBlock * stride, to += kKeyBlock * dim) {
    read_columns<dtype>(to, kKeyBlock, row, stride, kKeyBlock, dim);
  }
  if (rows == 0) return;
  std::memset(to, 0, static_cast<std::size_t>(kKeyBlock * dim) * sizeof(float));
  read_columns<dtype>(to, kKeyBlock, row, stride, rows, dim);
}

// What kWidth queries know of the keys so far: p = 2^(score - base), summed here and, times v, in a total for
// each dimension. These hold the current stretch of keys; `before` has those of the stretches before it, the
// sum last, so that no chain of additions grows with all keys.
struct Running {
  VecF base, sum;
  float* before;
};

// Blocks of keys in a stretch: at 8192 keys as many as there are stretches.
constexpr int kStretch = 32;

// The base follows scores that exceed it by more than this. Powers up to 2^16 lose no digit, and nearly no
// block has scores so far above those before: the old sums are scaled seldom.
constexpr float kSlack = 16.0f;

template <Dtype dtype>
GUDA_FAST_INLINE void raise_base(Running* running, VecF* total, VecF most, std::int64_t dim) {
  // Also what is not a number: then no power of the others leaves its range.
  const VecI above = ~(most <= running->base + kSlack);
  const VecF base = running->base;
  running->base = reinterpret_cast<VecF>((reinterpret_cast<VecI>(most) & above) |
                                         (reinterpret_cast<VecI>(base) & ~above));
  const VecF factor = exp2<dtype>(base - running->base);
  running->sum = running->sum * factor;
  for (std::int64_t d = 0; d < dim; ++d) total[d] = total[d] * factor;
  for (std::int64_t d = 0; d <= dim; ++d) {
    float* before = running->before + d * kWidth;
    store(before, load<VecF>(before) * factor);
  }
}

// Ends a stretch: what it holds goes to those before.
GUDA_FAST_INLINE void end_stretch(Running* running, VecF* total, std::int64_t dim) {
#pragma GCC unroll 8
  for (std::int64_t d = 0; d < dim; ++d) {
    float* before = running->before + d * kWidth;
    store(before, load<VecF>(before) + total[d]);
    total[d] = VecF{};
  }
  float* before = running->before + dim * kWidth;
  store(before, load<VecF>(before) + running->sum);
  running->sum = VecF{};
}

// One block of keys, `used` of which are there. queries and total have a vector for each dimension.
template <Dtype dtype>
GUDA_FAST_INLINE void add_keys(Running* running, VecF* total, const VecF* queries, const float* k,
                               const float* v, std::int64_t used, std::int64_t dim) {
  VecF p[kKeyBlock];
#pragma GCC unroll 8
  for (int i = 0; i < kKeyBlock; ++i) p[i] = VecF{};
#pragma GCC unroll 8
  for (std::int64_t d = 0; d < dim; ++d) {
#pragma GCC unroll 8
    for (int i = 0; i < kKeyBlock; ++i) p[i] = mul_add(queries[d], splat(k[d * kKeyBlock + i]), p[i]);
  }
  for (std::int64_t i = used; i < kKeyBlock; ++i) p[i] = splat(-__builtin_inff());
  const VecF most = max(max(max(p[0], p[1]), max(p[2], p[3])), max(max(p[4], p[5]), max(p[6], p[7])));
  if (any_not_at_most(most, running->base + kSlack)) raise_base<dtype>(running, total, most, dim);
#pragma GCC unroll 8
  for (int i = 0; i < kKeyBlock; ++i) p[i] = exp2<dtype>(p[i] - running->base);
  running->sum = running->sum + (((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7])));
#pragma GCC unroll 8
  for (std::int64_t d = 0; d < dim; ++d) {
    // The block's own sum first: its chains are short, and so is that of the blocks.
    VecF even = p[0] * splat(v[d * kKeyBlock]), odd = p[1] * splat(v[d * kKeyBlock + 1]);
#pragma GCC unroll 8
    for (int i = 2; i < kKeyBlock; i += 2) {
      even = mul_add(p[i], splat(v[d * kKeyBlock + i]), even);
      odd = mul_add(p[i + 1], splat(v[d * kKeyBlock + i + 1]), odd);
    }
    total[d] = total[d] + (even + odd);
  }
}

// to[d][i] = from[i][d] factor, and zeros in the lanes behind the last row.
template <Dtype dtype>
GUDA_FAST_INLINE void load_queries(float* to, const typename Activation<dtype>::Type* from,
                                   std::int64_t stride, std::int64_t rows, std::int64_t dim, double factor) {
  if (rows < kWidth) std::memset(to, 0, static_cast<std::size_t>(kWidth * dim) * sizeof(float));
  read_columns<dtype>(to, kWidth, from, stride, rows, dim);
  for (std::int64_t j = 0; j < kWidth * dim; ++j) to[j] = static_cast<float>(to[j] * factor);
}

// Up to kWidth queries. With a dimension that the compiler knows, everything stays in registers.
template <Dtype dtype, int fixed_dim>
void attend_tile(const Queries& call, std::int64_t first, std::int64_t rows) {
  using T = typename Activation<dtype>::Type;
  const std::int64_t dim = fixed_dim != 0 ? fixed_dim : call.dim;
  load_queries<dtype>(call.scratch, static_cast<const T*>(call.q) + first * call.q_stride, call.q_stride,
                      rows, dim, call.factor);
  VecF own[fixed_dim != 0 ? 2 * fixed_dim : 1];
  VecF* queries = own;
  if constexpr (fixed_dim == 0) {
    queries = reinterpret_cast<VecF*>(call.scratch);
  } else {
#pragma GCC unroll 8
    for (int d = 0; d < fixed_dim; ++d) own[d] = load<VecF>(call.scratch + d * kWidth);
  }
  VecF* total = queries + dim;
#pragma GCC unroll 8
  for (std::int64_t d = 0; d < dim; ++d) total[d] = VecF{};
  float* results = call.scratch + 2 * kWidth * dim;
  std::memset(results, 0, static_cast<std::size_t>(kWidth * (dim + 1)) * sizeof(float));
  // Not minus infinity, from which scores of minus infinity had no difference.
  Running running = {splat(-0x1.fffffep127f), VecF{}, results};
  const float *k = call.k, *v = call.v;
  for (std::int64_t left = call.keys; left > 0;) {
    for (int block = 0; block < kStretch && left > 0; ++block, left -= kKeyBlock) {
      add_keys<dtype>(&running, total, queries, k, v, left < kKeyBlock ? left : kKeyBlock, dim);
      k += kKeyBlock * dim;
      v += kKeyBlock * dim;
    }
    end_stretch(&running, total, dim);
  }
  const VecF share = 1.0f / load<VecF>(results + dim * kWidth);
  for (std::int64_t d = 0; d < dim; ++d) {
    store(results + d * kWidth, load<VecF>(results + d * kWidth) * share);
  }
  write_rows<dtype>(static_cast<T*>(call.out) + first * call.out_stride, call.out_stride, results, rows, dim);
}

template <Dtype dtype>
void attend(const Queries& call) {
  for (std::int64_t first = 0; first < call.rows; first += kWidth) {
    const std::int64_t left = call.rows - first;
    const std::int64_t rows = left < kWidth ? left : kWidth;
    if (call.dim == 8) {
      attend_tile<dtype, 8>(call, first, rows);
    } else {
      attend_tile<dtype, 0>(call, first, rows);
    }
  }
}

#define GUDA_FAST_INSTANTIATE(dtype)                                                             \
  template void pack_keys<dtype>(float*, const void*, std::int64_t, std::int64_t, std::int64_t); \
  template void attend<dtype>(const Queries&);
GUDA_FAST_INSTANTIATE(Dtype::float32)
GUDA_FAST_INSTANTIATE(Dtype::bfloat16)
#undef GUDA_FAST_INSTANTIATE

}  // namespace guda_fast::cpu::GUDA_FAST_SET
