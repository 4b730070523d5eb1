// Channel sums and the normalisation of some positions, for the instruction set of the including file.
// Every channel is a lane of its own, so that all widths give the same bits.
#pragma once

#include "cpu/activation.h"

namespace guda_fast::cpu::GUDA_FAST_SET {

// e^-a for a in [-87, 87], where neither it nor its exponent leaves the normal numbers: Cody and Waite's
// reduction, and a minimax polynomial of degree six (relative error 3.1e-9) whose first two terms are exact
// and added last.
GUDA_FAST_INLINE VecF exp_minus(VecF a) {
  const VecF n = nearest(a * -1.44269504088896341f);
  const VecF r = (a + n * 0.693359375f) + n * -2.12194440e-4f;  // of e^-r
  const VecF r2 = r * r;
  const VecF q =
      (r * -0.16666521f + 0.49999994f) + r2 * ((r * -0.008368717f + 0.04166839f) + r2 * 0.0013814599f);
  return scale_by_power(1.0f - (r - r2 * q), n);
}

// The same for a result that is rounded to bfloat16, half of whose spacing is 2^-9: relative error under
// 1e-5, 2.8e-6 of it the polynomial's and the rest from the rounded product.
GUDA_FAST_INLINE VecF exp_minus_short(VecF a) {
  const VecF t = a * -1.44269504088896341f;
  const VecF n = nearest(t);
  const VecF f = t - n;
  const VecF f2 = f * f;
  const VecF p = (f * 0.6931242f + 1.0f) + f2 * ((f * 0.055906426f + 0.24024099f) + f2 * 0.009582853f);
  return scale_by_power(p, n);
}

// y / (1 + e^-y). Below -87 the value at -87, which is -1e-36, stands for all: the limit is zero.
template <Dtype dtype>
GUDA_FAST_INLINE VecF silu(VecF y) {
  const VecF limit = VecF{} + 87.0f;
  const VecF bounded = max(-limit, y);
  const VecF a = min(bounded, limit);
  return bounded / (1.0f + (dtype == Dtype::float32 ? exp_minus(a) : exp_minus_short(a)));
}

// Sum by halving, whose rounding grows with the logarithm of the count alone.
template <int count>
GUDA_FAST_INLINE VecF tree_sum(const VecF* v) {
  if constexpr (count == 1) {
    return v[0];
  } else {
    return tree_sum<count / 2>(v) + tree_sum<count / 2>(v + count / 2);
  }
}

// Adds one block of positions. Its sum, and its squares about its own mean, are short enough for float32;
// sum^2 / count, which cancels later where the mean is large, is float64.
template <int count>
GUDA_FAST_INLINE void add_block(double* sum, double* square, const VecF* v, int used) {
  const float inverse = 1.0f / static_cast<float>(used);
  const VecF s = tree_sum<count>(v);
  const VecF mean = s * inverse;
  VecF squares[count];
  for (int i = 0; i < count; ++i) {
    const VecF d = v[i] - mean;
    squares[i] = i < used ? d * d : VecF{};
  }
  const VecF m2 = tree_sum<count>(squares);
  const VecD s_low = to_double(low_half(s)), s_high = to_double(high_half(s));
  const double share = 1.0 / used;
  store(sum, load<VecD>(sum) + s_low);
  store(sum + kHalf, load<VecD>(sum + kHalf) + s_high);
  store(square, load<VecD>(square) + (s_low * s_low * share + to_double(low_half(m2))));
  store(square + kHalf, load<VecD>(square + kHalf) + (s_high * s_high * share + to_double(high_half(m2))));
}

// `used` positions of up to kWidth channels, through a padded copy.
template <Dtype dtype>
void add_odd_block(double* sum, double* square, const typename Activation<dtype>::Type* x,
                   std::int64_t stride, int used, std::int64_t channels) {
  using T = typename Activation<dtype>::Type;
  VecF v[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    T padded[kWidth] = {};
    if (i < used) std::memcpy(padded, x + i * stride, static_cast<std::size_t>(channels) * sizeof(T));
    v[i] = Activation<dtype>::read(padded);
  }
  add_block<kBlock>(sum, square, v, used);
}

template <Dtype dtype>
void channel_sums(double* sum, double* square, const void* from, std::int64_t stride, std::int64_t positions,
                  std::int64_t channels) {
  using T = typename Activation<dtype>::Type;
  const T* x = static_cast<const T*>(from);
  std::int64_t position = 0;
  for (; position + kBlock <= positions; position += kBlock, x += kBlock * stride) {
    std::int64_t c = 0;
    for (; c + kWidth <= channels; c += kWidth) {
      VecF v[kBlock];
      for (int i = 0; i < kBlock; ++i) v[i] = Activation<dtype>::read(x + i * stride + c);
      add_block<kBlock>(sum + c, square + c, v, kBlock);
    }
    if (c < channels) add_odd_block<dtype>(sum + c, square + c, x + c, stride, kBlock, channels - c);
  }
  if (position == positions) return;
  const int rest = static_cast<int>(positions - position);
  for (std::int64_t c = 0; c < channels; c += kWidth) {
    const std::int64_t width = channels - c < kWidth ? channels - c : kWidth;
    add_odd_block<dtype>(sum + c, square + c, x + c, stride, rest, width);
  }
}

// Positions that are normalised together: one SiLU is a long chain of dependent operations, and several
// chains side by side keep the processor busy where one does not.
constexpr int kTogether = 4;

// kWidth channels of `count` positions.
template <Dtype dtype, bool activate, int count>
GUDA_FAST_INLINE void write_normalized(typename Activation<dtype>::Type* out, std::int64_t out_stride,
                                       const typename Activation<dtype>::Type* x, std::int64_t x_stride,
                                       const float* center, const float* factor, const float* offset) {
  const VecF from = load<VecF>(center), by = load<VecF>(factor), plus = load<VecF>(offset);
  VecF y[count];
  for (int i = 0; i < count; ++i) y[i] = (Activation<dtype>::read(x + i * x_stride) - from) * by + plus;
  for (int i = 0; i < count; ++i) y[i] = activate ? silu<dtype>(y[i]) : y[i];
  for (int i = 0; i < count; ++i) Activation<dtype>::write(out + i * out_stride, y[i]);
}

template <Dtype dtype, bool activate, int count>
GUDA_FAST_INLINE void normalize_positions(typename Activation<dtype>::Type* out, std::int64_t out_stride,
                                          const typename Activation<dtype>::Type* x, std::int64_t x_stride,
                                          std::int64_t channels, const float* center, const float* factor,
                                          const float* offset, std::int64_t ahead) {
  using T = typename Activation<dtype>::Type;
  std::int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth) {
    // This pass computes, the next row's first one waits for memory: what that will read is fetched
    // meanwhile.
    for (int i = 0; i < count; ++i) __builtin_prefetch(x + c + i * x_stride + ahead, 0, 2);

    write_normalized<dtype, activate, count>(out + c, out_stride, x + c, x_stride, center + c, factor + c,
                                             offset + c);
  }
  if (c == channels) return;
  T padded[count * kWidth] = {}, result[count * kWidth];
  const auto bytes = static_cast<std::size_t>(channels - c) * sizeof(T);
  for (int i = 0; i < count; ++i) std::memcpy(padded + i * kWidth, x + i * x_stride + c, bytes);
  write_normalized<dtype, activate, count>(result, kWidth, padded, kWidth, center + c, factor + c,
                                           offset + c);
  for (int i = 0; i < count; ++i) std::memcpy(out + i * out_stride + c, result + i * kWidth, bytes);
}

template <Dtype dtype, bool activate>
void normalize(void* to, std::int64_t out_stride, const void* from, std::int64_t x_stride,
               std::int64_t positions, std::int64_t channels, const float* center, const float* factor,
               const float* offset, std::int64_t ahead) {
  using T = typename Activation<dtype>::Type;
  T* out = static_cast<T*>(to);
  const T* x = static_cast<const T*>(from);
  std::int64_t left = positions;
  for (; left >= kTogether; left -= kTogether, out += kTogether * out_stride, x += kTogether * x_stride) {
    normalize_positions<dtype, activate, kTogether>(out, out_stride, x, x_stride, channels, center, factor,
                                                    offset, ahead);
  }
  for (; left > 0; --left, out += out_stride, x += x_stride) {
    normalize_positions<dtype, activate, 1>(out, out_stride, x, x_stride, channels, center, factor, offset,
                                            ahead);
  }
}

// result = of(sum over the channel's group of values), which is made once for each group.
template <typename Of>
GUDA_FAST_INLINE void spread_groups(double* result, const double* values, std::int64_t channels,
                                    std::int64_t groups, const Of& of) {
  const std::int64_t size = channels / groups;
  for (std::int64_t first = 0; first < channels; first += size) {
    double total = 0.0;
    for (std::int64_t c = first; c < first + size; ++c) total += values[c];
    total = of(total);
    for (std::int64_t c = first; c < first + size; ++c) result[c] = total;
  }
}

// Rounded to float32; a nan loses its payload.
GUDA_FAST_INLINE float to_float(double a) { return a == a ? static_cast<float>(a) : __builtin_nanf(""); }

void finish_norm(const NormRow& row, std::int64_t positions, std::int64_t channels, std::int64_t groups,
                 double eps) {
  const double count = static_cast<double>(positions), per_position = 1.0 / count;
  const double per_element = per_position / static_cast<double>(channels / groups);
  double *mean = row.mean, *inverse = row.inverse, *own = row.scratch;
  GUDA_FAST_NO_OVERLAP
  for (std::int64_t c = 0; c < channels; ++c) own[c] = row.sum[c] + count * row.addend[c];
  spread_groups(mean, own, channels, groups, [&](double total) { return total * per_element; });
  GUDA_FAST_NO_OVERLAP
  for (std::int64_t c = 0; c < channels; ++c) {
    const double channel_mean = row.sum[c] * per_position;
    const double off = channel_mean + row.addend[c] - mean[c];
    own[c] = (row.square[c] - row.sum[c] * channel_mean) + count * off * off;
  }
  spread_groups(inverse, own, channels, groups, [&](double total) {
    return 1.0 / __builtin_sqrt((total < 0.0 ? 0.0 : total * per_element) + eps);
  });
  GUDA_FAST_NO_OVERLAP
  for (std::int64_t c = 0; c < channels; ++c) {
    const double center = mean[c] - row.addend[c];
    const double after = 1.0 + row.scale[c];
    const double factor = inverse[c] * row.weight[c] * after;
    row.center[c] = to_float(center);
    row.factor[c] = to_float(factor);
    // With what the rounded center leaves out.
    row.offset[c] = to_float((row.center[c] - center) * factor + row.bias[c] * after + row.shift[c]);
  }
}

#define GUDA_FAST_INSTANTIATE(dtype)                                                                  \
  template void channel_sums<dtype>(double*, double*, const void*, std::int64_t, std::int64_t,        \
                                    std::int64_t);                                                    \
  template void normalize<dtype, false>(void*, std::int64_t, const void*, std::int64_t, std::int64_t, \
                                        std::int64_t, const float*, const float*, const float*,       \
                                        std::int64_t);                                                \
  template void normalize<dtype, true>(void*, std::int64_t, const void*, std::int64_t, std::int64_t,  \
                                       std::int64_t, const float*, const float*, const float*,        \
                                       std::int64_t);
GUDA_FAST_INSTANTIATE(Dtype::float32)
GUDA_FAST_INSTANTIATE(Dtype::bfloat16)
#undef GUDA_FAST_INSTANTIATE

}  // namespace guda_fast::cpu::GUDA_FAST_SET
