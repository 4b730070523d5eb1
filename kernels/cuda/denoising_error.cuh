// errors[m, r] = weight[r] sum (p_m - target)^2; paired[m, r] = weight[r] sum (p_m - p_0)(p_m + p_0 - 2
// target)
//
// Differences are taken in float32, products and sums in float64, in the order of the C++ kernels: chunks of
// kChunk elements, in each of them element j in virtual lane j % kLanes, the lanes in a tree, the chunks one
// after another. So the bits do not depend on the grid, on rows or on models, and are those of `cpp`.
#pragma once

#include "rows.cuh"

namespace guda_fast::kernels {

constexpr int kChunk = 4096;
constexpr int kLanes = 16;
// Small thread blocks: while the lanes of one wait for predictions, others make their targets.
constexpr int kErrorThreads = 128;
constexpr int kTotalThreads = 128;

struct Float32 {
  using Storage = float;
  static GUDA_FAST_DEVICE float widen(Storage value) { return value; }
};

struct BFloat16 {
  using Storage = std::uint16_t;
  static GUDA_FAST_DEVICE float widen(Storage value) { return bits<float>(std::uint32_t{value} << 16); }
};

struct Float16 {
  using Storage = std::uint16_t;
  static GUDA_FAST_DEVICE float widen(Storage value) {
#if defined(__CUDA_ARCH__)
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
    return wide;
#else
    const std::uint32_t magnitude = value & 0x7FFFu, sign = std::uint32_t{value & 0x8000u} << 16;
    if (magnitude < 0x0400u)
      return bits<float>(bits<std::uint32_t>(static_cast<float>(magnitude) * 0x1p-24f) | sign);
    const std::uint32_t rebias = magnitude >= 0x7C00u ? 224u << 23 : 112u << 23;  // inf and nan: exponent 255
    return bits<float>(((magnitude << 13) + rebias) | sign);
#endif
  }
};

struct DenoisingError {
  double* errors;        // (M, R)
  double* paired;        // (M, R), or null
  double* parts;         // (chunks, M, R); null where a row is one chunk
  double* paired_parts;  // the same
  const void* predictions;
  std::int64_t model_stride, row_stride;
  Layout layout;
  Samples<const float> x0;
  Rows rows;
  const double* weight;  // (R,)
  std::int64_t models, row_count;
  std::int64_t elements;  // of a row
  std::uint32_t chunks;   // of a row
};

// One chunk of one row, which is one thread block's work.
struct Chunk {
  std::int64_t row, number, start;
  int elements;
};

GUDA_FAST_DEVICE Chunk chunk_of(const DenoisingError& call, std::uint32_t thread_block) {
  const std::int64_t number = thread_block % call.chunks, start = number * kChunk;
  const std::int64_t left = call.elements - start;
  return {thread_block / call.chunks, number, start, static_cast<int>(left < kChunk ? left : kChunk)};
}

// What one thread makes of a chunk's target (kChunk floats, aligned to 16 bytes).
GUDA_FAST_DEVICE void make_target(const DenoisingError& call, const Chunk& chunk, int thread, float* target) {
  const Row row = read_row(call.rows, call.x0, chunk.row);
  for (int at = thread * kBlockElements; at < chunk.elements; at += kErrorThreads * kBlockElements) {
    const std::int64_t element = chunk.start + at;
    const Quad value = noised(row, call.x0, element / kBlockElements, call.elements - element);
    *reinterpret_cast<Quad*>(target + at) = value;
  }
}

// Neighbouring lanes that one thread sums, from one word of memory. Wider words would leave fewer threads to
// keep loads under way: a lane's sum is one chain of additions.
template <typename Element, bool kPacked>
constexpr int kWidth = kPacked ? static_cast<int>(sizeof(float) / sizeof(typename Element::Storage)) : 1;

template <int kCount>
struct LaneSums {
  double error[kCount], paired[kCount];
};

template <typename Storage, int kCount>
struct Word {
  Storage value[kCount];
};

template <typename Storage, int kCount>
GUDA_FAST_DEVICE Word<Storage, kCount> read_word(const Storage* from) {
  using Read = Word<Storage, kCount>;
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Read) == sizeof(std::uint32_t)) {
    return bits<Read>(__ldg(reinterpret_cast<const std::uint32_t*>(from)));
  } else {
    return bits<Read>(__ldg(reinterpret_cast<const std::uint16_t*>(from)));
  }
#else
  Read word;
  std::memcpy(&word, from, sizeof(word));
  return word;
#endif
}

// The product of two float32 values is exact in float64, so that fusing its addition changes no bit.
GUDA_FAST_DEVICE double add_square(double sum, float difference) {
  const double wide = difference;
#if defined(__CUDA_ARCH__)
  return __fma_rn(wide, wide, sum);
#else
  return sum + wide * wide;
#endif
}

// Sums of the neighbouring lanes from `lane` on, for one model.
template <typename Element, bool kPacked, bool kPaired>
class Lanes {
 public:
  using Storage = typename Element::Storage;
  static constexpr int kCount = kWidth<Element, kPacked>;
  static constexpr int kThreads = kLanes / kCount;  // that one model takes

  GUDA_FAST_DEVICE Lanes(const DenoisingError& call, const Chunk& chunk, std::int64_t model, int lane,
                         const float* target)
      : layout_(call.layout), chunk_(chunk), target_(target), index_(lane) {
    base_ = static_cast<const Storage*>(call.predictions) + chunk.row * call.row_stride;
    prediction_ = base_ + model * call.model_stride;
    at_ = kPacked ? Position{chunk.start + lane, {}} : position(layout_, chunk.start + lane);
  }

  GUDA_FAST_DEVICE LaneSums<kCount> sums() {
    // All loads of a batch are under way before the first is needed.
    constexpr int kBatch = !kPacked ? 4 : kPaired ? 8 : 16;
    LaneSums<kCount> sums = {};
    while (index_ + (kBatch - 1) * kLanes + kCount <= chunk_.elements) {
      Word<Storage, kCount> prediction[kBatch] = {}, base[kBatch] = {};
      for (int step = 0; step < kBatch; ++step) {
        prediction[step] = read_word<Storage, kCount>(prediction_ + at_.offset);
        if (kPaired) base[step] = read_word<Storage, kCount>(base_ + at_.offset);
        next();
      }
      for (int step = 0; step < kBatch; ++step) {
        const int index = index_ + (step - kBatch) * kLanes;
        for (int i = 0; i < kCount; ++i) add(sums, i, index, prediction[step].value[i], base[step].value[i]);
      }
    }
    for (; index_ < chunk_.elements; next()) {
      for (int i = 0; i < kCount && index_ + i < chunk_.elements; ++i) {
        add(sums, i, index_, prediction_[at_.offset + i], base_[at_.offset + i]);
      }
    }
    return sums;
  }

 private:
  GUDA_FAST_DEVICE void next() {
    index_ += kLanes;
    if (kPacked) {
      at_.offset += kLanes;
    } else {
      advance(layout_, at_, kLanes);
    }
  }

  GUDA_FAST_DEVICE void add(LaneSums<kCount>& sums, int i, int index, Storage prediction,
                            Storage base) const {
    const float target = target_[index + i];
    const float wide = Element::widen(prediction), difference = wide - target;
    sums.error[i] = add_square(sums.error[i], difference);
    if (kPaired) {
      const float wide_base = Element::widen(base), base_difference = wide_base - target;
      const double together = static_cast<double>(difference) + static_cast<double>(base_difference);
      sums.paired[i] += static_cast<double>(wide - wide_base) * together;
    }
  }

  const Layout& layout_;
  const Chunk& chunk_;
  const float* target_;
  const Storage *prediction_, *base_;
  Position at_;
  int index_;
};

// A cell's result from the total of its chunks. Model 0's difference to itself is 0, whatever it predicts.
GUDA_FAST_DEVICE void store_total(const DenoisingError& call, std::int64_t cell, double error,
                                  double paired) {
  const double weight = call.weight[cell % call.row_count];
  call.errors[cell] = weight * error;
  if (call.paired != nullptr) call.paired[cell] = cell < call.row_count ? 0.0 : weight * paired;
}

GUDA_FAST_DEVICE void store_chunk(const DenoisingError& call, const Chunk& chunk, std::int64_t model,
                                  double error, double paired) {
  const std::int64_t cell = model * call.row_count + chunk.row;
  if (call.chunks == 1) {
    store_total(call, cell, error, paired);
    return;
  }
  const std::int64_t at = chunk.number * call.models * call.row_count + cell;
  call.parts[at] = error;
  if (call.paired != nullptr) call.paired_parts[at] = paired;
}

GUDA_FAST_DEVICE void total_cell(const DenoisingError& call, std::int64_t cell) {
  const std::int64_t cells = call.models * call.row_count;
  double error = 0.0, paired = 0.0;
  for (std::int64_t at = cell; at < call.chunks * cells; at += cells) {
    error += call.parts[at];
    if (call.paired != nullptr) paired += call.paired_parts[at];
  }
  store_total(call, cell, error, paired);
}

#if defined(__CUDACC__)

// Lane j adds lane j + 8, then j + 4, 2 and 1, as the C++ kernels do; the first thread has the result.
template <int kCount>
__device__ __forceinline__ double total(unsigned int threads, double (&lanes)[kCount]) {
  for (int stride = kLanes / 2; stride >= kCount; stride /= 2) {
    for (int i = 0; i < kCount; ++i) {
      lanes[i] += __shfl_down_sync(threads, lanes[i], stride / kCount, kLanes / kCount);
    }
  }
  if constexpr (kCount == 2) lanes[0] += lanes[1];
  return lanes[0];
}

template <typename Element, bool kPacked, bool kPaired>
__global__ void __launch_bounds__(kErrorThreads)
    denoising_error_kernel(const __grid_constant__ DenoisingError call) {
  using Unit = Lanes<Element, kPacked, kPaired>;
  static_assert(Unit::kCount <= 2, "total() joins at most two lanes of a thread");
  __shared__ alignas(16) float target[kChunk];
  const int thread = static_cast<int>(threadIdx.x);
  const Chunk chunk = chunk_of(call, blockIdx.x);
  make_target(call, chunk, thread, target);
  __syncthreads();
  // The threads of one unit are in one warp; they leave the loop together, other units of the warp may not.
  const int unit = thread / Unit::kThreads, lane = thread % Unit::kThreads * Unit::kCount;
  const unsigned int threads = ((1u << Unit::kThreads) - 1u)
                               << (thread % 32 / Unit::kThreads * Unit::kThreads);
  for (std::int64_t model = unit; model < call.models; model += kErrorThreads / Unit::kThreads) {
    LaneSums<Unit::kCount> sums = Unit(call, chunk, model, lane, target).sums();
    const double error = total(threads, sums.error);
    const double paired = kPaired ? total(threads, sums.paired) : 0.0;
    if (lane == 0) store_chunk(call, chunk, model, error, paired);
  }
}

static __global__ void __launch_bounds__(kTotalThreads)
    denoising_error_total_kernel(const __grid_constant__ DenoisingError call) {
  const std::int64_t cell = std::int64_t{blockIdx.x} * kTotalThreads + threadIdx.x;
  if (cell < call.models * call.row_count) total_cell(call, cell);
}

// All models and rows in one launch. `packed`: contiguous predictions, every row of every model at a multiple
// of 4 bytes. row_count * call.chunks thread blocks, at least one: the grid depends on shapes alone.
template <typename Element>
cudaError_t denoising_error(const DenoisingError& call, bool packed, std::uint32_t thread_blocks,
                            cudaStream_t stream) {
  const bool paired = call.paired != nullptr;
  const auto kernel = packed ? (paired ? denoising_error_kernel<Element, true, true>
                                       : denoising_error_kernel<Element, true, false>)
                             : (paired ? denoising_error_kernel<Element, false, true>
                                       : denoising_error_kernel<Element, false, false>);
  kernel<<<thread_blocks, kErrorThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

// The chunks of every cell in order; also where rows have none.
inline cudaError_t denoising_error_total(const DenoisingError& call, std::uint32_t thread_blocks,
                                         cudaStream_t stream) {
  denoising_error_total_kernel<<<thread_blocks, kTotalThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

#endif

}  // namespace guda_fast::kernels
