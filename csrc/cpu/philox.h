// Philox4x32-10 and Box-Muller on kWidth element blocks at a time (kernels/NOISE.md).
#pragma once

#include "cpu/simd.h"

namespace guda_fast::cpu::GUDA_FAST_SET {

constexpr int kBlockElements = 4;
constexpr int kStep = kBlockElements * kWidth;  // elements that one call makes

// kWidth 32-bit values in the low halves of 64-bit lanes, positions 0, 2, 4, ... and 1, 3, 5, ...
// The high halves hold rubbish, which mul_wide ignores: so a product needs no unpacking, its low
// word is the product itself, and its high word is one shift away.
struct Split {
  VecU64 even, odd;
};

GUDA_FAST_INLINE VecU64 broadcast(std::uint32_t value) { return VecU64{} + value; }

GUDA_FAST_INLINE VecU merge(Split a) {
  return reinterpret_cast<VecU>((a.even & 0xFFFFFFFFu) | (a.odd << 32));
}

constexpr std::uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr std::uint32_t kIncrement0 = 0x9E3779B9u, kIncrement1 = 0xBB67AE85u;
constexpr std::uint32_t kRounds = 10;

// The block that sits at a vector position, counted from the step's first block. The transposition
// in transpose() works within 128-bit lanes, and this order makes its results contiguous.
constexpr int block_at(int position) { return kWidth / 4 * (position % 4) + position / 4; }

struct BlockOrder {
  std::uint64_t even[kHalf], odd[kHalf];
};

constexpr BlockOrder block_order() {
  BlockOrder order = {};
  for (int lane = 0; lane < kHalf; ++lane) {
    order.even[lane] = static_cast<std::uint64_t>(block_at(2 * lane));
    order.odd[lane] = static_cast<std::uint64_t>(block_at(2 * lane + 1));
  }
  return order;
}

GUDA_FAST_INLINE Split first_blocks(std::uint32_t first_block) {
  static constexpr BlockOrder kOrder = block_order();
  return {load<VecU64>(kOrder.even) + first_block, load<VecU64>(kOrder.odd) + first_block};
}

// The generator of one stream. Only word 0 of the counter differs between lanes, so half of the
// first two rounds is scalar and done once.
struct Philox {
  std::uint32_t round1_word2, round2_word0, round2_word2, round2_word3;
  std::uint32_t key0, key1;
};

GUDA_FAST_INLINE Philox make_philox(const NoiseStream& stream) {
  const std::uint64_t product1 = std::uint64_t{kMultiplier1} * stream.counter2;
  const std::uint32_t word0 = static_cast<std::uint32_t>(product1 >> 32) ^ stream.counter1 ^ stream.key0;
  const std::uint32_t word1 = static_cast<std::uint32_t>(product1);
  const std::uint64_t product0 = std::uint64_t{kMultiplier0} * word0;
  Philox philox;
  philox.key0 = stream.key0;
  philox.key1 = stream.key1;
  philox.round1_word2 = stream.counter3 ^ stream.key1;
  philox.round2_word0 = word1 ^ (stream.key0 + kIncrement0);
  philox.round2_word2 = static_cast<std::uint32_t>(product0 >> 32) ^ (stream.key1 + kIncrement1);
  philox.round2_word3 = static_cast<std::uint32_t>(product0);
  return philox;
}

GUDA_FAST_INLINE void philox_half(const Philox& philox, VecU64 blocks, VecU64 (&words)[4]) {
  const VecU64 multiplier0 = broadcast(kMultiplier0), multiplier1 = broadcast(kMultiplier1);
  VecU64 product0 = mul_wide(blocks, multiplier0);
  VecU64 word2 = (product0 >> 32) ^ broadcast(philox.round1_word2);
  VecU64 product1 = mul_wide(word2, multiplier1);
  VecU64 word0 = (product1 >> 32) ^ broadcast(philox.round2_word0);
  VecU64 word1 = product1;
  word2 = product0 ^ broadcast(philox.round2_word2);
  VecU64 word3 = broadcast(philox.round2_word3);
#pragma GCC unroll 8
  for (std::uint32_t round = 2; round < kRounds; ++round) {
    product0 = mul_wide(word0, multiplier0);
    product1 = mul_wide(word2, multiplier1);
    word0 = (product1 >> 32) ^ word1 ^ broadcast(philox.key0 + round * kIncrement0);
    word2 = (product0 >> 32) ^ word3 ^ broadcast(philox.key1 + round * kIncrement1);
    word1 = product1;
    word3 = product0;
  }
  words[0] = word0;
  words[1] = word1;
  words[2] = word2;
  words[3] = word3;
}

GUDA_FAST_INLINE void philox_words(const Philox& philox, Split blocks, VecU (&words)[4]) {
  VecU64 even[4], odd[4];
  philox_half(philox, blocks.even, even);
  philox_half(philox, blocks.odd, odd);
  for (int word = 0; word < 4; ++word) words[word] = merge({even[word], odd[word]});
}

// -2 ln u for u = (2k + 1) 2^-24 in (0, 1), with a relative error under 4e-7, also next to u = 1:
// u = m 2^e with m in [sqrt(1/2), sqrt(2)), f = m - 1 is exact, and so is u - 1 where e is 0.
GUDA_FAST_INLINE VecF minus_two_log(VecF u) {
  constexpr std::int32_t kSqrtHalf = 0x3F3504F3, kOne = 0x3F800000;
  const VecI shifted = reinterpret_cast<VecI>(u) + (kOne - kSqrtHalf);
  const VecF exponent = __builtin_convertvector((shifted >> 23) - 127, VecF);
  const VecF f = reinterpret_cast<VecF>((shifted & 0x007FFFFF) + kSqrtHalf) - 1.0f;
  // Minimax polynomial of -2 log1p(f) / f = -2 + f * (...).
  const VecF f2 = f * f;
  const VecF low = (-0.6666942834854126f * f + 1.0000064373016357f) +
                   f2 * (-0.3981386125087738f * f + 0.4994257688522339f);
  const VecF high = (-0.32359957695007324f * f + 0.34485316276550293f) + f2 * 0.20166635513305664f;
  const VecF log = f * (f * (low + (f2 * f2) * high) - 2.0f);
  return exponent * -1.3862943649291992f + log;
}

// The two normals r cos(2 pi u_b), r sin(2 pi u_b) with r = sqrt(-2 ln u_a).
GUDA_FAST_INLINE void box_muller(VecU word_a, VecU word_b, VecF& normal_cos, VecF& normal_sin) {
  // 1.mantissa - (1 - 2^-24) is exact.
  const VecF u = reinterpret_cast<VecF>((word_a >> 9) | 0x3F800000u) - 0x1.fffffep-1f;
  const VecF r = sqrt(minus_two_log(u));
  // u_b in units of 2^-32 turns, plus an eighth: bits 31 and 30 are the nearest quadrant, and the
  // angle in quarter turns from there, in [-1/2, 1/2), follows from the rest without rounding.
  const VecU turns = (word_b & 0xFFFFFE00u) + (0x100u + 0x20000000u);
  const VecI centred = reinterpret_cast<VecI>((turns << 2) ^ 0x80000000u);
  const VecF y = __builtin_convertvector(centred, VecF) * 0x1p-32f;
  const VecF z = y * y;
  const VecF z2 = z * z;
  // Minimax polynomials of sin(pi y / 2) and cos(pi y / 2).
  const VecF sine = y * ((-0.6459610462188721f * z + 1.570796251296997f) +
                         z2 * (-0.004554165527224541f * z + 0.07965986430644989f));
  const VecF cosine =
      (-1.2336980104446411f * z + 1.0f) + z2 * (-0.02042795903980732f * z + 0.25360700488090515f);
  const VecF r_sine = r * sine, r_cosine = r * cosine;
  const VecI odd_quadrant = reinterpret_cast<VecI>((turns & 0x40000000u) != 0);
  const VecF along_cos = odd_quadrant ? r_sine : r_cosine;
  const VecF along_sin = odd_quadrant ? r_cosine : r_sine;
  const VecU sign_sin = turns & 0x80000000u;
  const VecU sign_cos = (turns + 0x40000000u) & 0x80000000u;
  normal_cos = reinterpret_cast<VecF>(reinterpret_cast<VecU>(along_cos) ^ sign_cos);
  normal_sin = reinterpret_cast<VecF>(reinterpret_cast<VecU>(along_sin) ^ sign_sin);
}

// From one vector per element of a block to kStep contiguous elements.
template <typename Vec>
GUDA_FAST_INLINE void transpose(Vec (&v)[4]) {
  const VecU64 low01 = reinterpret_cast<VecU64>(interleave_low(v[0], v[1]));
  const VecU64 low23 = reinterpret_cast<VecU64>(interleave_low(v[2], v[3]));
  const VecU64 high01 = reinterpret_cast<VecU64>(interleave_high(v[0], v[1]));
  const VecU64 high23 = reinterpret_cast<VecU64>(interleave_high(v[2], v[3]));
  v[0] = reinterpret_cast<Vec>(pair_low(low01, low23));
  v[1] = reinterpret_cast<Vec>(pair_high(low01, low23));
  v[2] = reinterpret_cast<Vec>(pair_low(high01, high23));
  v[3] = reinterpret_cast<Vec>(pair_high(high01, high23));
}

GUDA_FAST_INLINE void normals(const Philox& philox, Split blocks, VecF (&eps)[4]) {
  VecU words[4];
  philox_words(philox, blocks, words);
  box_muller(words[0], words[1], eps[0], eps[1]);
  box_muller(words[2], words[3], eps[2], eps[3]);
  transpose(eps);
}

GUDA_FAST_INLINE Split next_blocks(Split blocks) {
  return {blocks.even + std::uint64_t{kWidth}, blocks.odd + std::uint64_t{kWidth}};
}

}  // namespace guda_fast::cpu::GUDA_FAST_SET
