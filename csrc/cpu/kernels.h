// The kernels that every instruction set provides, all on one chunk of contiguous elements.
//
// The files that define them are compiled with instruction-set flags, so they must not instantiate
// anything with external linkage (no standard containers): the linker could keep that copy for all.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace guda_fast::cpu {

// Work and partial sums are cut at fixed places, so that results do not depend on the thread count.
constexpr std::int64_t kChunk = 4096;

// Virtual lanes of a float64 sum: element j goes to lane j % 16 whatever the vector width is.
constexpr int kLanes = 16;

// Everything of the Philox key and counter but the element block (kernels/NOISE.md).
struct NoiseStream {
  std::uint32_t key0, key1;
  std::uint32_t counter1, counter2, counter3;
};

// Positions whose sums are float32 before they join float64 ones.
constexpr int kBlock = 16;

struct ErrorSums {
  double error;   // sum of (p - target)^2
  double paired;  // sum of (p - p0)(p + p0 - 2 target)
};

// Four words per block, for blocks first_block, first_block + 1, ...
using NoiseWords = void (*)(std::uint32_t* out, std::int64_t blocks, std::uint32_t first_block,
                            const NoiseStream& stream);

// out = x0_scale * x0 + eps_scale * eps; without x0 (null) out = eps_scale * eps.
using AddNoise = void (*)(float* out, const float* x0, float x0_scale, float eps_scale,
                          const NoiseStream& stream, std::uint32_t first_block, std::int64_t elements);

using ErrorSum = double (*)(const void* prediction, const float* target, std::int64_t elements);

using PairedSum = ErrorSums (*)(const void* prediction, const void* base, const float* target,
                                std::int64_t elements);

// Adds to the float64 sum of each channel, and to its sum of squares, those of some positions.
// `sum` and `square` are padded to a multiple of kLanes channels, as are the vectors of Normalize.
using ChannelSums = void (*)(double* sum, double* square, const void* x, std::int64_t position_stride,
                             std::int64_t positions, std::int64_t channels);

// What one row's norm is made of: vectors of channels.
struct NormRow {
  const double *sum, *square;
  double *mean, *inverse, *scratch;
  const float *addend, *weight, *bias, *scale, *shift;
  float *center, *factor, *offset;
};

// From the sums over `positions` to center, factor and offset.
using FinishNorm = void (*)(const NormRow& row, std::int64_t positions, std::int64_t channels,
                            std::int64_t groups, double eps);

// y = (x - center) factor + offset per channel, then SiLU or nothing. What lies `ahead` elements behind x is
// needed next.
using Normalize = void (*)(void* out, std::int64_t out_position_stride, const void* x,
                           std::int64_t x_position_stride, std::int64_t positions, std::int64_t channels,
                           const float* center, const float* factor, const float* offset, std::int64_t ahead);

// Keys that attention takes at a time.
constexpr int kKeyBlock = 8;

// Queries of one (row, head) pair, `dim` elements each, and its packed keys and values. scratch, aligned as
// vectors are, has room for (3 * dim + 4) * kLanes.
struct Queries {
  void* out;
  std::int64_t out_stride;
  const void* q;
  std::int64_t q_stride;
  std::int64_t rows, keys, dim;
  double factor;  // of the scores, times the binary logarithm of e
  const float *k, *v;
  float* scratch;
};

// to[block][d][i] = from[block * kKeyBlock + i][d], and zeros behind the last row.
using PackKeys = void (*)(float* to, const void* from, std::int64_t stride, std::int64_t rows,
                          std::int64_t dim);

// out = softmax of the scores, times v.
using Attend = void (*)(const Queries& call);

// The products that stand for a tile's convolution, and what the sizes of conv3x3 are multiples of.
constexpr int kTaps = 9, kPoints = 16, kTileStep = 8, kOutputStep = 32, kInputStep = 16;

// to[point][panel][input][o] for output channels first to last, from weight[output][tap][input]; a panel has
// two vectors of output channels.
using TransformWeights = void (*)(float* to, const float* weight, std::int64_t first, std::int64_t last,
                                  std::int64_t outputs, std::int64_t inputs);

// to[point][input], from the channels of 4 x 4 positions.
using TransformTile = void (*)(float* to, std::int64_t point_stride, const float* const* from,
                               std::int64_t inputs);

// to[point][tile][output] = the sum over inputs of tiles[point][tile][input] weight[point][input][output].
using MultiplyPoints = void (*)(float* to, std::int64_t to_point, const float* tiles,
                                std::int64_t tiles_point, const float* weight, std::int64_t count,
                                std::int64_t outputs, std::int64_t inputs);

// The channels of 2 x 2 positions, from those of all points.
using GatherTile = void (*)(float* const* to, const float* from, std::int64_t point_stride, const float* bias,
                            std::int64_t outputs);

struct Kernels {
  const char* name;
  NoiseWords noise_words;
  AddNoise add_noise;
  ErrorSum error_sum[kDtypes];    // by Dtype
  PairedSum paired_sum[kDtypes];  // by Dtype
  ChannelSums channel_sums[2];    // float32, bfloat16
  FinishNorm finish_norm;
  Normalize normalize[2][2];  // the same, without and with SiLU
  PackKeys pack_keys[2];      // float32, bfloat16
  Attend attend[2];
  TransformWeights transform_weights;
  TransformTile transform_tile;
  MultiplyPoints multiply_points;
  GatherTile gather_tile;
};

#define GUDA_FAST_DECLARE_KERNELS(set)                                                                       \
  namespace set {                                                                                            \
  void noise_words(std::uint32_t* out, std::int64_t blocks, std::uint32_t first_block,                       \
                   const NoiseStream& stream);                                                               \
  void add_noise(float* out, const float* x0, float x0_scale, float eps_scale, const NoiseStream& stream,    \
                 std::uint32_t first_block, std::int64_t elements);                                          \
  template <Dtype dtype>                                                                                     \
  double error_sum(const void* prediction, const float* target, std::int64_t elements);                      \
  template <Dtype dtype>                                                                                     \
  ErrorSums paired_sum(const void* prediction, const void* base, const float* target,                        \
                       std::int64_t elements);                                                               \
  template <Dtype dtype>                                                                                     \
  void channel_sums(double* sum, double* square, const void* x, std::int64_t position_stride,                \
                    std::int64_t positions, std::int64_t channels);                                          \
  void finish_norm(const NormRow& row, std::int64_t positions, std::int64_t channels, std::int64_t groups,   \
                   double eps);                                                                              \
  template <Dtype dtype, bool activate>                                                                      \
  void normalize(void* out, std::int64_t out_position_stride, const void* x, std::int64_t x_position_stride, \
                 std::int64_t positions, std::int64_t channels, const float* center, const float* factor,    \
                 const float* offset, std::int64_t ahead);                                                   \
  template <Dtype dtype>                                                                                     \
  void pack_keys(float* to, const void* from, std::int64_t stride, std::int64_t rows, std::int64_t dim);     \
  template <Dtype dtype>                                                                                     \
  void attend(const Queries& call);                                                                          \
  void transform_weights(float* to, const float* weight, std::int64_t first, std::int64_t last,              \
                         std::int64_t outputs, std::int64_t inputs);                                         \
  void transform_tile(float* to, std::int64_t point_stride, const float* const* from, std::int64_t inputs);  \
  void multiply_points(float* to, std::int64_t to_point, const float* tiles, std::int64_t tiles_point,       \
                       const float* weight, std::int64_t count, std::int64_t outputs, std::int64_t inputs);  \
  void gather_tile(float* const* to, const float* from, std::int64_t point_stride, const float* bias,        \
                   std::int64_t outputs);                                                                    \
  }

GUDA_FAST_DECLARE_KERNELS(baseline)
GUDA_FAST_DECLARE_KERNELS(avx2)
GUDA_FAST_DECLARE_KERNELS(avx512)
#undef GUDA_FAST_DECLARE_KERNELS

}  // namespace guda_fast::cpu
