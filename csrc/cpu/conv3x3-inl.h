// Winograd's F(2x2, 3x3) for the instruction set of the including file: 2 x 2 outputs from 4 x 4 inputs, by
// 16 products of matrices instead of the 36 multiplications of each pair of channels. Coefficients are 1, 1/2
// and 1/4.
#pragma once

#include "cpu/simd.h"

namespace guda_fast::cpu::GUDA_FAST_SET {

// A product of matrices is made of pieces of kTiles tiles by two vectors of output channels, whose sums stay
// in registers.
constexpr int kTiles = kWidth == 16 ? 8 : 4;
constexpr int kPanel = 2 * kWidth;
static_assert(kTileStep % kTiles == 0 && kOutputStep % kPanel == 0 && kInputStep % kWidth == 0);

// (a + b, a - b) / 2 and so on: one side of G g G^T, of three rows into four.
GUDA_FAST_INLINE void spread_weight(VecF* to, VecF a, VecF b, VecF c, int step) {
  const VecF half = (a + c) * 0.5f, middle = b * 0.5f;
  to[0] = a;
  to[step] = half + middle;
  to[2 * step] = half - middle;
  to[3 * step] = c;
}

// taps[tap][c][o] of kWidth input and as many output channels, from weight[o][tap][c].
GUDA_FAST_INLINE void gather_taps(float (*taps)[kWidth * kWidth], const float* from, std::int64_t inputs) {
  for (int tap = 0; tap < kTaps; ++tap, from += inputs) {
    for (int o = 0; o < kWidth; o += 4) {
      for (int c = 0; c < kWidth; c += 4) {
        Quad block[4];
        for (int i = 0; i < 4; ++i) block[i] = load<Quad>(from + (o + i) * kTaps * inputs + c);
        transpose(block);
        for (int i = 0; i < 4; ++i) store(taps[tap] + (c + i) * kWidth + o, block[i]);
      }
    }
  }
}

// kWidth output channels of one input channel.
GUDA_FAST_INLINE void transform_weight(float* to, std::int64_t point_stride,
                                       const float (*taps)[kWidth * kWidth], int c) {
  VecF g[kTaps], rows[12], points[kPoints];
  for (int tap = 0; tap < kTaps; ++tap) g[tap] = load<VecF>(taps[tap] + c * kWidth);
  for (int x = 0; x < 3; ++x) spread_weight(rows + x, g[x], g[3 + x], g[6 + x], 3);
  for (int y = 0; y < 4; ++y) spread_weight(points + 4 * y, rows[3 * y], rows[3 * y + 1], rows[3 * y + 2], 1);
  for (int point = 0; point < kPoints; ++point) store(to + point * point_stride, points[point]);
}

void transform_weights(float* to, const float* weight, std::int64_t first, std::int64_t last,
                       std::int64_t outputs, std::int64_t inputs) {
  float taps[kTaps][kWidth * kWidth];
  for (std::int64_t o = first; o < last; o += kWidth) {
    float* panel = to + o / kPanel * kPanel * inputs + o % kPanel;
    for (std::int64_t c = 0; c < inputs; c += kWidth) {
      gather_taps(taps, weight + o * kTaps * inputs + c, inputs);
      for (int i = 0; i < kWidth; ++i) transform_weight(panel + (c + i) * kPanel, outputs * inputs, taps, i);
    }
  }
}

// One side of B^T d B.
GUDA_FAST_INLINE void spread_input(VecF* to, VecF a, VecF b, VecF c, VecF d, int step) {
  to[0] = a - c;
  to[step] = b + c;
  to[2 * step] = c - b;
  to[3 * step] = b - d;
}

void transform_tile(float* to, std::int64_t point_stride, const float* const* from, std::int64_t inputs) {
  for (std::int64_t c = 0; c < inputs; c += kWidth) {
    VecF rows[kPoints], points[kPoints];
    for (int x = 0; x < 4; ++x) {
      spread_input(rows + x, load<VecF>(from[x] + c), load<VecF>(from[4 + x] + c),
                   load<VecF>(from[8 + x] + c), load<VecF>(from[12 + x] + c), 4);
    }
    for (int y = 0; y < 4; ++y) {
      const VecF* row = rows + 4 * y;
      spread_input(points + 4 * y, row[0], row[1], row[2], row[3], 1);
    }
    for (int point = 0; point < kPoints; ++point) store(to + point * point_stride + c, points[point]);
  }
}

// kTiles rows of one point's product, for a panel of output channels.
GUDA_FAST_INLINE void multiply(float* to, std::int64_t to_stride, const float* tiles, std::int64_t inputs,
                               const float* panel) {
  VecF low[kTiles] = {}, high[kTiles] = {};
  for (std::int64_t c = 0; c < inputs; ++c) {
    const VecF u_low = load<VecF>(panel + c * kPanel), u_high = load<VecF>(panel + c * kPanel + kWidth);
    for (int tile = 0; tile < kTiles; ++tile) {
      const VecF v = splat(tiles[tile * inputs + c]);
      low[tile] = mul_add(v, u_low, low[tile]);
      high[tile] = mul_add(v, u_high, high[tile]);
    }
  }
  for (int tile = 0; tile < kTiles; ++tile) {
    store(to + tile * to_stride, low[tile]);
    store(to + tile * to_stride + kWidth, high[tile]);
  }
}

void multiply_points(float* to, std::int64_t to_point, const float* tiles, std::int64_t tiles_point,
                     const float* weight, std::int64_t count, std::int64_t outputs, std::int64_t inputs) {
  for (int point = 0; point < kPoints; ++point) {
    for (std::int64_t o = 0; o < outputs; o += kPanel) {
      const float* panel = weight + point * outputs * inputs + o * inputs;
      for (std::int64_t tile = 0; tile < count; tile += kTiles) {
        multiply(to + point * to_point + tile * outputs + o, outputs,
                 tiles + point * tiles_point + tile * inputs, inputs, panel);
      }
    }
  }
}

// A^T m A, with the bias, of one tile; to[i] is null where an output lies beyond the edge.
void gather_tile(float* const* to, const float* from, std::int64_t point_stride, const float* bias,
                 std::int64_t outputs) {
  for (std::int64_t o = 0; o < outputs; o += kWidth) {
    VecF top[4], bottom[4];
    for (int x = 0; x < 4; ++x) {
      VecF m[4];
      for (int y = 0; y < 4; ++y) m[y] = load<VecF>(from + (4 * y + x) * point_stride + o);
      top[x] = (m[0] + m[1]) + m[2];
      bottom[x] = (m[1] - m[2]) - m[3];
    }
    const VecF added = load<VecF>(bias + o);
    store(to[0] + o, ((top[0] + top[1]) + top[2]) + added);
    if (to[1]) store(to[1] + o, ((top[1] - top[2]) - top[3]) + added);
    if (to[2]) store(to[2] + o, ((bottom[0] + bottom[1]) + bottom[2]) + added);
    if (to[3]) store(to[3] + o, ((bottom[1] - bottom[2]) - bottom[3]) + added);
  }
}

}  // namespace guda_fast::cpu::GUDA_FAST_SET
