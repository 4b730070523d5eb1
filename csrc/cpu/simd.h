// Vectors of one instruction set, through the compiler's vector extension, and the few operations
// that the extension lacks. Included by the per-set files only, which define GUDA_FAST_SET.
//
// Every operation but mul_add is exact or correctly rounded and acts on lanes alone, and contraction is off,
// so that all widths give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/kernels.h"

#define GUDA_FAST_INLINE static inline __attribute__((always_inline))

// Before a loop that the compiler is to make vectors of: no two arrays in it overlap.
#if defined(__clang__)
#define GUDA_FAST_NO_OVERLAP _Pragma("clang loop vectorize(assume_safety)")
#else
#define GUDA_FAST_NO_OVERLAP _Pragma("GCC ivdep")
#endif

namespace guda_fast::cpu::GUDA_FAST_SET {

#if defined(__AVX512F__)
constexpr int kWidth = 16;  // 32-bit lanes
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kHalf = kWidth / 2;  // 64-bit lanes

typedef float VecF __attribute__((vector_size(4 * kWidth)));
typedef std::int32_t VecI __attribute__((vector_size(4 * kWidth)));
typedef std::uint32_t VecU __attribute__((vector_size(4 * kWidth)));
typedef std::uint64_t VecU64 __attribute__((vector_size(8 * kHalf)));
typedef double VecD __attribute__((vector_size(8 * kHalf)));
typedef float HalfF __attribute__((vector_size(4 * kHalf)));
typedef std::uint16_t VecU16 __attribute__((vector_size(2 * kWidth)));
typedef float Quad __attribute__((vector_size(16)));
typedef std::uint32_t QuadU __attribute__((vector_size(16)));
typedef std::uint16_t QuadU16 __attribute__((vector_size(8)));

template <typename Vec, typename T>
GUDA_FAST_INLINE Vec load(const T* from) {
  Vec v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <typename Vec, typename T>
GUDA_FAST_INLINE void store(T* to, Vec v) {
  std::memcpy(to, &v, sizeof(v));
}

// Low halves of a's 64-bit lanes times the low halves of b's: full 64-bit products.
GUDA_FAST_INLINE VecU64 mul_wide(VecU64 a, VecU64 b) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecU64>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecU64>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<VecU64>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

GUDA_FAST_INLINE VecF sqrt(VecF a) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(a);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(a);
#elif defined(__SSE2__)
  return _mm_sqrt_ps(a);
#else
  VecF root;
  for (int lane = 0; lane < kWidth; ++lane) root[lane] = __builtin_sqrtf(a[lane]);
  return root;
#endif
}

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

GUDA_FAST_INLINE VecF splat(float a) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(a);
#elif defined(__AVX2__)
  return _mm256_set1_ps(a);
#elif defined(__SSE2__)
  return _mm_set1_ps(a);
#else
  return a - VecF{};
#endif
}

// a b + c, rounded once where the instruction set can. Only for results that are equal to a tolerance.
GUDA_FAST_INLINE VecF mul_add(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// Whether a > b in any lane, or either is not a number.
GUDA_FAST_INLINE bool any_not_at_most(VecF a, VecF b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps(_mm_cmpnle_ps(a, b)) != 0;
#else
  const VecI at_most = a <= b;
  std::int32_t all = -1;
  for (int lane = 0; lane < kWidth; ++lane) all &= at_most[lane];
  return all == 0;
#endif
}

// v, but zero where a < b.
GUDA_FAST_INLINE VecF zero_where_less(VecF v, VecF a, VecF b) {
#if defined(__AVX512F__)
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ), v);
#else
  const VecI less = a < b;
  return reinterpret_cast<VecF>(reinterpret_cast<VecI>(v) & ~less);
#endif
}

// The nearest integer, ties to even, for |a| < 2^22.
GUDA_FAST_INLINE VecF nearest(VecF a) {
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  // A sum with it has no fraction bits.
  constexpr float kToInteger = 0x1.8p23f;
  return (a + kToInteger) - kToInteger;
#endif
}

// a 2^n for an integer n, where neither a nor the result leaves the normal numbers.
GUDA_FAST_INLINE VecF scale_by_power(VecF a, VecF n) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(a, n);
#else
  return reinterpret_cast<VecF>(reinterpret_cast<VecI>(a) + (__builtin_convertvector(n, VecI) << 23));
#endif
}

// The same where n may be less than -126, for which the result is some number, or not be one, for which it is
// a's.
GUDA_FAST_INLINE VecF scale_by_any_power(VecF a, VecF n) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(a, n);
#else
  const VecI exponent = __builtin_convertvector(max(n, splat(-126.0f)), VecI) + 127;
  return a * reinterpret_cast<VecF>(exponent << 23);
#endif
}

// The given lanes of a followed by b. Compilers make one shuffle of it, the same instructions as from
// __builtin_shufflevector, which GCC 11 lacks.
template <typename Out, int... lanes, typename Vec>
GUDA_FAST_INLINE Out shuffle(Vec a, Vec b) {
  constexpr int count = sizeof(a) / sizeof(a[0]);
  return Out{(lanes < count ? a[lanes % count] : b[lanes % count])...};
}

// Within each 128-bit lane: a0 b0 a1 b1, and a2 b2 a3 b3.
template <typename Vec>
GUDA_FAST_INLINE Vec interleave_low(Vec a, Vec b) {
#if defined(__AVX512F__)
  return shuffle<Vec, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29>(a, b);
#elif defined(__AVX2__)
  return shuffle<Vec, 0, 8, 1, 9, 4, 12, 5, 13>(a, b);
#else
  return shuffle<Vec, 0, 4, 1, 5>(a, b);
#endif
}

template <typename Vec>
GUDA_FAST_INLINE Vec interleave_high(Vec a, Vec b) {
#if defined(__AVX512F__)
  return shuffle<Vec, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31>(a, b);
#elif defined(__AVX2__)
  return shuffle<Vec, 2, 10, 3, 11, 6, 14, 7, 15>(a, b);
#else
  return shuffle<Vec, 2, 6, 3, 7>(a, b);
#endif
}

// Within each 128-bit lane: the low 64 bits of a, then of b; and the high ones.
GUDA_FAST_INLINE VecU64 pair_low(VecU64 a, VecU64 b) {
#if defined(__AVX512F__)
  return shuffle<VecU64, 0, 8, 2, 10, 4, 12, 6, 14>(a, b);
#elif defined(__AVX2__)
  return shuffle<VecU64, 0, 4, 2, 6>(a, b);
#else
  return shuffle<VecU64, 0, 2>(a, b);
#endif
}

GUDA_FAST_INLINE VecU64 pair_high(VecU64 a, VecU64 b) {
#if defined(__AVX512F__)
  return shuffle<VecU64, 1, 9, 3, 11, 5, 13, 7, 15>(a, b);
#elif defined(__AVX2__)
  return shuffle<VecU64, 1, 5, 3, 7>(a, b);
#else
  return shuffle<VecU64, 1, 3>(a, b);
#endif
}

GUDA_FAST_INLINE HalfF low_half(VecF a) {
#if defined(__AVX512F__)
  return shuffle<HalfF, 0, 1, 2, 3, 4, 5, 6, 7>(a, a);
#elif defined(__AVX2__)
  return shuffle<HalfF, 0, 1, 2, 3>(a, a);
#else
  return shuffle<HalfF, 0, 1>(a, a);
#endif
}

GUDA_FAST_INLINE HalfF high_half(VecF a) {
#if defined(__AVX512F__)
  return shuffle<HalfF, 8, 9, 10, 11, 12, 13, 14, 15>(a, a);
#elif defined(__AVX2__)
  return shuffle<HalfF, 4, 5, 6, 7>(a, a);
#else
  return shuffle<HalfF, 2, 3>(a, a);
#endif
}

// The four columns of four rows.
GUDA_FAST_INLINE void transpose(Quad* rows) {
  const Quad low01 = shuffle<Quad, 0, 4, 1, 5>(rows[0], rows[1]),
             low23 = shuffle<Quad, 0, 4, 1, 5>(rows[2], rows[3]);
  const Quad high01 = shuffle<Quad, 2, 6, 3, 7>(rows[0], rows[1]);
  const Quad high23 = shuffle<Quad, 2, 6, 3, 7>(rows[2], rows[3]);
  rows[0] = shuffle<Quad, 0, 1, 4, 5>(low01, low23);
  rows[1] = shuffle<Quad, 2, 3, 6, 7>(low01, low23);
  rows[2] = shuffle<Quad, 0, 1, 4, 5>(high01, high23);
  rows[3] = shuffle<Quad, 2, 3, 6, 7>(high01, high23);
}

GUDA_FAST_INLINE VecD to_double(HalfF a) { return __builtin_convertvector(a, VecD); }

// To 32 bits and back; narrow() takes values below 2^16. The compilers' own conversions split the vector
// first.
GUDA_FAST_INLINE VecU widen(VecU16 a) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecU>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(a)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecU>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(a)));
#else
  return __builtin_convertvector(a, VecU);
#endif
}

GUDA_FAST_INLINE VecU16 narrow(VecU a) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecU16>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(a)));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(a));
  return reinterpret_cast<VecU16>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  return __builtin_convertvector(a, VecU16);
#endif
}

GUDA_FAST_INLINE VecF bfloat16_to_float(VecU16 bits) { return reinterpret_cast<VecF>(widen(bits) << 16); }

// Not by scaling float32 subnormals: torch.set_flush_denormal would change the result.
GUDA_FAST_INLINE VecF float16_to_float(VecU16 bits) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(bits));
#elif defined(__AVX2__) && defined(__F16C__)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(bits));
#else
  const VecU half = __builtin_convertvector(bits, VecU);
  const VecU magnitude = half & 0x7FFFu;
  const VecU rebias = VecU{} + (112u << 23);
  const VecU special = reinterpret_cast<VecU>(magnitude >= 0x7C00u) & rebias;  // inf, nan: exponent 255
  const VecU normal = (magnitude << 13) + rebias + special;
  const VecF subnormal = __builtin_convertvector(reinterpret_cast<VecI>(magnitude), VecF) * 0x1p-24f;
  const VecU is_subnormal = reinterpret_cast<VecU>(magnitude < 0x0400u);
  const VecU value = (reinterpret_cast<VecU>(subnormal) & is_subnormal) | (normal & ~is_subnormal);
  return reinterpret_cast<VecF>(value | ((half & 0x8000u) << 16));
#endif
}

}  // namespace guda_fast::cpu::GUDA_FAST_SET
