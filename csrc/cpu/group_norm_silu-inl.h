// Channel sums and the normalisation of some positions, for the instruction set of the including file.
// Every channel is a lane of its own, so that all widths give the same bits.
#pragma once

#include "cpu/simd.h"

namespace guda_fast::cpu::GUDA_FAST_SET {

template <Dtype dtype>
struct Activation {
  using Type = float;
  GUDA_FAST_INLINE VecF read(const Type* from) { return load<VecF>(from); }
  GUDA_FAST_INLINE void write(Type* to, VecF v) { store(to, v); }
};

template <>
struct Activation<Dtype::bfloat16> {
  using Type = std::uint16_t;
  GUDA_FAST_INLINE VecF read(const Type* from) { return bfloat16_to_float(load<VecU16>(from)); }
  // To the nearest, ties to even.
  GUDA_FAST_INLINE void write(Type* to, VecF v) {
    const VecU bits = reinterpret_cast<VecU>(v);
    const VecU is_nan = reinterpret_cast<VecU>(v != v);
    const VecU rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    store(to, __builtin_convertvector((rounded & ~is_nan) | (0x7FC0u & is_nan), VecU16));
  }
};

// The smaller and the larger one; b where either is not a number.
GUDA_FAST_INLINE VecF min(VecF a, VecF b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
  return _mm_min_ps(a, b);
#else
  const VecI less = a < b;
  return reinterpret_cast<VecF>((reinterpret_cast<VecI>(a) & less) | (reinterpret_cast<VecI>(b) & ~less));
#endif
}

GUDA_FAST_INLINE VecF max(VecF a, VecF b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  const VecI more = a > b;
  return reinterpret_cast<VecF>((reinterpret_cast<VecI>(a) & more) | (reinterpret_cast<VecI>(b) & ~more));
#endif
}

// e^-a for a in [-87, 87], where neither it nor its exponent leaves the normal numbers: Cody and Waite's
// reduction and the polynomial of Cephes' expf.
GUDA_FAST_INLINE VecF exp_minus(VecF a) {
  constexpr float kToInteger =
      0x1.8p23f;  // a sum with it has no fraction bits, and its integer in the low bits
  const VecF shifted = a * -1.44269504088896341f + kToInteger;
  const VecF n = shifted - kToInteger;
  const VecF r = (a + n * 0.693359375f) + n * -2.12194440e-4f;  // of e^-r
  VecF p = r * 1.9875691500e-4f - 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r - 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r - 5.0000001201e-1f;
  p = 1.0f - (p * (r * r) + r);
  return reinterpret_cast<VecF>(reinterpret_cast<VecU>(p) + (reinterpret_cast<VecU>(shifted) << 23));
}

// y / (1 + e^-y). Below -87 the value at -87, which is -1e-36, stands for all: the limit is zero.
GUDA_FAST_INLINE VecF silu(VecF y) {
  const VecF limit = VecF{} + 87.0f;
  const VecF bounded = max(-limit, y);
  return bounded / (1.0f + exp_minus(min(bounded, limit)));
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

template <Dtype dtype, bool activate>
GUDA_FAST_INLINE void write_normalized(typename Activation<dtype>::Type* out,
                                       const typename Activation<dtype>::Type* x, const float* center,
                                       const float* factor, const float* offset) {
  const VecF y = (Activation<dtype>::read(x) - load<VecF>(center)) * load<VecF>(factor) + load<VecF>(offset);
  Activation<dtype>::write(out, activate ? silu(y) : y);
}

template <Dtype dtype, bool activate>
void normalize(void* to, std::int64_t out_stride, const void* from, std::int64_t x_stride,
               std::int64_t positions, std::int64_t channels, const float* center, const float* factor,
               const float* offset) {
  using T = typename Activation<dtype>::Type;
  T* out = static_cast<T*>(to);
  const T* x = static_cast<const T*>(from);
  for (std::int64_t position = 0; position < positions; ++position, out += out_stride, x += x_stride) {
    std::int64_t c = 0;
    for (; c + kWidth <= channels; c += kWidth) {
      write_normalized<dtype, activate>(out + c, x + c, center + c, factor + c, offset + c);
    }
    if (c < channels) {
      T padded[kWidth] = {}, result[kWidth];
      const auto bytes = static_cast<std::size_t>(channels - c) * sizeof(T);
      std::memcpy(padded, x + c, bytes);
      write_normalized<dtype, activate>(result, padded, center + c, factor + c, offset + c);
      std::memcpy(out + c, result, bytes);
    }
  }
}

#define GUDA_FAST_INSTANTIATE(dtype)                                                                  \
  template void channel_sums<dtype>(double*, double*, const void*, std::int64_t, std::int64_t,        \
                                    std::int64_t);                                                    \
  template void normalize<dtype, false>(void*, std::int64_t, const void*, std::int64_t, std::int64_t, \
                                        std::int64_t, const float*, const float*, const float*);      \
  template void normalize<dtype, true>(void*, std::int64_t, const void*, std::int64_t, std::int64_t,  \
                                       std::int64_t, const float*, const float*, const float*);
GUDA_FAST_INSTANTIATE(Dtype::float32)
GUDA_FAST_INSTANTIATE(Dtype::bfloat16)
#undef GUDA_FAST_INSTANTIATE

}  // namespace guda_fast::cpu::GUDA_FAST_SET
