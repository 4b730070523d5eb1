// Philox4x32-10 and Box-Muller for one block of four elements (kernels/NOISE.md).
//
// The arithmetic is that of csrc/cpu/philox.h, operation by operation, so that the normals have the same
// bits. A fused multiply-add would round once where two operations round twice: compile with --fmad=false,
// host code with -ffp-contract=off; and without --use_fast_math, whose square root is approximate and whose
// subnormal numbers are zero. As plain C++ this header is what tests compare with the C++ kernels on
// machines without a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define GUDA_FAST_DEVICE __host__ __device__ __forceinline__
#else
#define GUDA_FAST_DEVICE inline
#endif

namespace guda_fast::kernels {

constexpr int kBlockElements = 4;

// Everything of the Philox key and counter but the element block.
struct NoiseStream {
  std::uint32_t key0, key1;
  std::uint32_t counter1, counter2, counter3;
};

struct Words {
  std::uint32_t word[kBlockElements];
};

struct Normals {
  float value[kBlockElements];
};

template <typename To, typename From>
GUDA_FAST_DEVICE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

GUDA_FAST_DEVICE NoiseStream noise_stream(std::uint64_t seed, std::int64_t query_id, std::int64_t timestep,
                                          std::int64_t sample) {
  const auto id = static_cast<std::uint64_t>(query_id);
  return {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32),
          static_cast<std::uint32_t>(timestep) | static_cast<std::uint32_t>(sample) << 16,
          static_cast<std::uint32_t>(id), static_cast<std::uint32_t>(id >> 32)};
}

GUDA_FAST_DEVICE Words philox(const NoiseStream& stream, std::uint32_t block) {
  std::uint32_t word0 = block, word1 = stream.counter1, word2 = stream.counter2, word3 = stream.counter3;
  for (std::uint32_t round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * word0;
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * word2;
    word0 = static_cast<std::uint32_t>(product1 >> 32) ^ word1 ^ (stream.key0 + round * 0x9E3779B9u);
    word2 = static_cast<std::uint32_t>(product0 >> 32) ^ word3 ^ (stream.key1 + round * 0xBB67AE85u);
    word1 = static_cast<std::uint32_t>(product1);
    word3 = static_cast<std::uint32_t>(product0);
  }
  return {{word0, word1, word2, word3}};
}

GUDA_FAST_DEVICE float square_root(float value) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(value);
#else
  return std::sqrt(value);
#endif
}

// -2 ln u for u = (2k + 1) 2^-24 in (0, 1), with a relative error under 4e-7, also next to u = 1:
// u = m 2^e with m in [sqrt(1/2), sqrt(2)), f = m - 1 is exact, and so is u - 1 where e is 0.
GUDA_FAST_DEVICE float minus_two_log(float u) {
  constexpr std::int32_t kSqrtHalf = 0x3F3504F3, kOne = 0x3F800000;
  const std::int32_t shifted = bits<std::int32_t>(u) + (kOne - kSqrtHalf);
  const float exponent = static_cast<float>((shifted >> 23) - 127);
  const float f = bits<float>((shifted & 0x007FFFFF) + kSqrtHalf) - 1.0f;
  // Minimax polynomial of -2 log1p(f) / f = -2 + f * (...).
  const float f2 = f * f;
  const float low = (-0.6666942834854126f * f + 1.0000064373016357f) +
                    f2 * (-0.3981386125087738f * f + 0.4994257688522339f);
  const float high = (-0.32359957695007324f * f + 0.34485316276550293f) + f2 * 0.20166635513305664f;
  const float log = f * (f * (low + (f2 * f2) * high) - 2.0f);
  return exponent * -1.3862943649291992f + log;
}

// The two normals r cos(2 pi u_b), r sin(2 pi u_b) with r = sqrt(-2 ln u_a).
GUDA_FAST_DEVICE void box_muller(std::uint32_t word_a, std::uint32_t word_b, float& normal_cos,
                                 float& normal_sin) {
  // 1.mantissa - (1 - 2^-24) is exact.
  const float u = bits<float>((word_a >> 9) | 0x3F800000u) - 0x1.fffffep-1f;
  const float r = square_root(minus_two_log(u));
  // u_b in units of 2^-32 turns, plus an eighth: bits 31 and 30 are the nearest quadrant, and the
  // angle in quarter turns from there, in [-1/2, 1/2), follows from the rest without rounding.
  const std::uint32_t turns = (word_b & 0xFFFFFE00u) + (0x100u + 0x20000000u);
  const float y = static_cast<float>(bits<std::int32_t>((turns << 2) ^ 0x80000000u)) * 0x1p-32f;
  const float z = y * y;
  const float z2 = z * z;
  // Minimax polynomials of sin(pi y / 2) and cos(pi y / 2).
  const float sine = y * ((-0.6459610462188721f * z + 1.570796251296997f) +
                          z2 * (-0.004554165527224541f * z + 0.07965986430644989f));
  const float cosine =
      (-1.2336980104446411f * z + 1.0f) + z2 * (-0.02042795903980732f * z + 0.25360700488090515f);
  const float r_sine = r * sine, r_cosine = r * cosine;
  const bool odd_quadrant = (turns & 0x40000000u) != 0;
  const std::uint32_t along_cos = bits<std::uint32_t>(odd_quadrant ? r_sine : r_cosine);
  const std::uint32_t along_sin = bits<std::uint32_t>(odd_quadrant ? r_cosine : r_sine);
  normal_cos = bits<float>(along_cos ^ ((turns + 0x40000000u) & 0x80000000u));
  normal_sin = bits<float>(along_sin ^ (turns & 0x80000000u));
}

GUDA_FAST_DEVICE Normals normals(const NoiseStream& stream, std::uint32_t block) {
  const Words words = philox(stream, block);
  Normals result;
  box_muller(words.word[0], words.word[1], result.value[0], result.value[1]);
  box_muller(words.word[2], words.word[3], result.value[2], result.value[3]);
  return result;
}

}  // namespace guda_fast::kernels
