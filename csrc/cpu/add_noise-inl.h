// add_noise and the raw noise words, for the instruction set of the including file.
#pragma once

#include "cpu/philox.h"

namespace guda_fast::cpu::GUDA_FAST_SET {

void noise_words(std::uint32_t* out, std::int64_t blocks, std::uint32_t first_block,
                 const NoiseStream& stream) {
  const Philox philox = make_philox(stream);
  Split counter = first_blocks(first_block);
  for (std::int64_t done = 0; done < blocks; done += kWidth) {
    VecU words[4];
    philox_words(philox, counter, words);
    transpose(words);
    const std::int64_t left = blocks - done < kWidth ? blocks - done : kWidth;
    std::memcpy(out + 4 * done, words, static_cast<std::size_t>(left) * 4 * sizeof(std::uint32_t));
    counter = next_blocks(counter);
  }
}

template <bool with_x0>
GUDA_FAST_INLINE void add_noise_chunk(float* out, const float* x0, float x0_scale, float eps_scale,
                                      const NoiseStream& stream, std::uint32_t first_block,
                                      std::int64_t elements) {
  const Philox philox = make_philox(stream);
  Split counter = first_blocks(first_block);
  VecF eps[4];
  std::int64_t j = 0;
  for (; j + kStep <= elements; j += kStep) {
    normals(philox, counter, eps);
    counter = next_blocks(counter);
    for (int part = 0; part < 4; ++part) {
      VecF value = eps[part] * eps_scale;
      if (with_x0) value = load<VecF>(x0 + j + part * kWidth) * x0_scale + value;
      store(out + j + part * kWidth, value);
    }
  }
  if (j == elements) return;
  float tail[kStep];
  normals(philox, counter, eps);
  std::memcpy(tail, eps, sizeof(tail));
  for (int i = 0; j < elements; ++i, ++j) {
    const float value = tail[i] * eps_scale;
    out[j] = with_x0 ? x0[j] * x0_scale + value : value;
  }
}

void add_noise(float* out, const float* x0, float x0_scale, float eps_scale, const NoiseStream& stream,
               std::uint32_t first_block, std::int64_t elements) {
  if (x0 != nullptr) {
    add_noise_chunk<true>(out, x0, x0_scale, eps_scale, stream, first_block, elements);
  } else {
    add_noise_chunk<false>(out, x0, x0_scale, eps_scale, stream, first_block, elements);
  }
}

}  // namespace guda_fast::cpu::GUDA_FAST_SET
