// How activations of each type are read into float32, and written from it.
#pragma once

#include "cpu/simd.h"

namespace guda_fast::cpu::GUDA_FAST_SET {

template <Dtype dtype>
struct Activation {
  using Type = float;
  GUDA_FAST_INLINE float to_float(Type v) { return v; }
  GUDA_FAST_INLINE VecF read(const Type* from) { return load<VecF>(from); }
  GUDA_FAST_INLINE void write(Type* to, VecF v) { store(to, v); }
  GUDA_FAST_INLINE Quad read_quad(const Type* from) { return load<Quad>(from); }
  GUDA_FAST_INLINE void write_quad(Type* to, Quad v) { store(to, v); }
};

template <>
struct Activation<Dtype::bfloat16> {
  using Type = std::uint16_t;
  GUDA_FAST_INLINE float to_float(Type bits) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float v;
    std::memcpy(&v, &wide, sizeof(v));
    return v;
  }
  GUDA_FAST_INLINE VecF read(const Type* from) { return bfloat16_to_float(load<VecU16>(from)); }
  GUDA_FAST_INLINE void write(Type* to, VecF v) { store(to, narrow(rounded(reinterpret_cast<VecU>(v)))); }
  GUDA_FAST_INLINE Quad read_quad(const Type* from) {
    return reinterpret_cast<Quad>(__builtin_convertvector(load<QuadU16>(from), QuadU) << 16);
  }
  GUDA_FAST_INLINE void write_quad(Type* to, Quad v) {
    store(to, __builtin_convertvector(rounded(reinterpret_cast<QuadU>(v)), QuadU16));
  }

 private:
  // To the nearest, ties to even. A nan stays one as long as its low bits are zero, as those of bfloat16
  // values and of arithmetic on them are, and as finish_norm makes those of its parameters.
  template <typename Bits>
  GUDA_FAST_INLINE Bits rounded(Bits bits) {
    return (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  }
};

}  // namespace guda_fast::cpu::GUDA_FAST_SET
