// Error sums of one chunk, for the instruction set of the including file: float32 differences,
// float64 products and sums in sixteen lanes.
#pragma once

#include "cpu/simd.h"

namespace guda_fast::cpu::GUDA_FAST_SET {

template <Dtype dtype>
struct Element {
  using Type = std::uint16_t;
};
template <>
struct Element<Dtype::float32> {
  using Type = float;
};

template <Dtype dtype>
GUDA_FAST_INLINE VecF load_prediction(const typename Element<dtype>::Type* from) {
  if constexpr (dtype == Dtype::float32) {
    return load<VecF>(from);
  } else if constexpr (dtype == Dtype::bfloat16) {
    return bfloat16_to_float(load<VecU16>(from));
  } else {
    return float16_to_float(load<VecU16>(from));
  }
}

// Sixteen float64 lanes, and how they become one number.
constexpr int kParts = kLanes / kWidth;

struct LaneSum {
  VecD low[kParts], high[kParts];
};

GUDA_FAST_INLINE void add_product(LaneSum& sum, int part, HalfF a_low, HalfF a_high, VecD b_low,
                                  VecD b_high) {
  sum.low[part] += to_double(a_low) * b_low;
  sum.high[part] += to_double(a_high) * b_high;
}

GUDA_FAST_INLINE double total(const LaneSum& sum) {
  double lanes[kLanes];
  for (int part = 0; part < kParts; ++part) {
    store(lanes + part * kWidth, sum.low[part]);
    store(lanes + part * kWidth + kHalf, sum.high[part]);
  }
  for (int stride = kLanes / 2; stride > 0; stride /= 2) {
    for (int lane = 0; lane < stride; ++lane) lanes[lane] += lanes[lane + stride];
  }
  return lanes[0];
}

// The last, incomplete group of lanes, padded so that its extra lanes add zero.
template <typename T>
struct Tail {
  T prediction[kLanes] = {}, base[kLanes] = {};
  float target[kLanes] = {};
};

template <Dtype dtype>
GUDA_FAST_INLINE void add_error(LaneSum& sum, const typename Element<dtype>::Type* prediction,
                                const float* target) {
  for (int part = 0; part < kParts; ++part) {
    const VecF difference =
        load_prediction<dtype>(prediction + part * kWidth) - load<VecF>(target + part * kWidth);
    const HalfF low = low_half(difference), high = high_half(difference);
    add_product(sum, part, low, high, to_double(low), to_double(high));
  }
}

template <Dtype dtype>
double error_sum(const void* prediction, const float* target, std::int64_t elements) {
  using T = typename Element<dtype>::Type;
  const T* p = static_cast<const T*>(prediction);
  LaneSum sum = {};
  std::int64_t j = 0;
  for (; j + kLanes <= elements; j += kLanes) add_error<dtype>(sum, p + j, target + j);
  if (j < elements) {
    Tail<T> tail;
    std::memcpy(tail.prediction, p + j, static_cast<std::size_t>(elements - j) * sizeof(T));
    std::memcpy(tail.target, target + j, static_cast<std::size_t>(elements - j) * sizeof(float));
    add_error<dtype>(sum, tail.prediction, tail.target);
  }
  return total(sum);
}

template <Dtype dtype>
GUDA_FAST_INLINE void add_paired(LaneSum& error, LaneSum& paired,
                                 const typename Element<dtype>::Type* prediction,
                                 const typename Element<dtype>::Type* base, const float* target) {
  for (int part = 0; part < kParts; ++part) {
    const VecF p = load_prediction<dtype>(prediction + part * kWidth);
    const VecF p0 = load_prediction<dtype>(base + part * kWidth);
    const VecF t = load<VecF>(target + part * kWidth);
    const VecF difference = p - t, base_difference = p0 - t, change = p - p0;
    const VecD low = to_double(low_half(difference)), high = to_double(high_half(difference));
    add_product(error, part, low_half(difference), high_half(difference), low, high);
    add_product(paired, part, low_half(change), high_half(change), low + to_double(low_half(base_difference)),
                high + to_double(high_half(base_difference)));
  }
}

template <Dtype dtype>
ErrorSums paired_sum(const void* prediction, const void* base, const float* target, std::int64_t elements) {
  using T = typename Element<dtype>::Type;
  const T* p = static_cast<const T*>(prediction);
  const T* p0 = static_cast<const T*>(base);
  LaneSum error = {}, paired = {};
  std::int64_t j = 0;
  for (; j + kLanes <= elements; j += kLanes) add_paired<dtype>(error, paired, p + j, p0 + j, target + j);
  if (j < elements) {
    Tail<T> tail;
    std::memcpy(tail.prediction, p + j, static_cast<std::size_t>(elements - j) * sizeof(T));
    std::memcpy(tail.base, p0 + j, static_cast<std::size_t>(elements - j) * sizeof(T));
    std::memcpy(tail.target, target + j, static_cast<std::size_t>(elements - j) * sizeof(float));
    add_paired<dtype>(error, paired, tail.prediction, tail.base, tail.target);
  }
  return {total(error), total(paired)};
}

template double error_sum<Dtype::float32>(const void*, const float*, std::int64_t);
template double error_sum<Dtype::bfloat16>(const void*, const float*, std::int64_t);
template double error_sum<Dtype::float16>(const void*, const float*, std::int64_t);
template ErrorSums paired_sum<Dtype::float32>(const void*, const void*, const float*, std::int64_t);
template ErrorSums paired_sum<Dtype::bfloat16>(const void*, const void*, const float*, std::int64_t);
template ErrorSums paired_sum<Dtype::float16>(const void*, const void*, const float*, std::int64_t);

}  // namespace guda_fast::cpu::GUDA_FAST_SET
