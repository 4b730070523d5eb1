// The rows of both noise ops on a device: where elements lie, and the noised elements of one block of four.
//
// Nothing here checks an index: on the device that would cost a synchronisation, and it is the caller's duty.
#pragma once

#include "philox.cuh"

namespace guda_fast::kernels {

constexpr int kMaxDims = 4;

// Sizes and strides in elements, padded in front with sizes of 1.
struct Layout {
  std::int64_t size[kMaxDims];
  std::int64_t stride[kMaxDims];
};

// Where a logical element lies, and its index, with which the next ones are found without a division.
struct Position {
  std::int64_t offset;
  std::int64_t index[kMaxDims];
};

GUDA_FAST_DEVICE Position position(const Layout& layout, std::int64_t element) {
  Position at = {};
  auto rest = static_cast<std::uint64_t>(element);
  for (int dim = kMaxDims - 1; dim >= 0 && rest != 0; --dim) {
    const auto size = static_cast<std::uint64_t>(layout.size[dim]);
    const std::uint64_t next = rest / size;
    at.index[dim] = static_cast<std::int64_t>(rest - next * size);
    at.offset += at.index[dim] * layout.stride[dim];
    rest = next;
  }
  return at;
}

// To the element `step` further. Past the last one lies the first, so that the offset is always one of the
// layout's.
GUDA_FAST_DEVICE void advance(const Layout& layout, Position& at, int step) {
  constexpr int kLast = kMaxDims - 1;
  at.index[kLast] += step;
  at.offset += step * layout.stride[kLast];
  while (at.index[kLast] >= layout.size[kLast]) {
    bool full = true;
    at.index[kLast] -= layout.size[kLast];
    at.offset -= layout.size[kLast] * layout.stride[kLast];
    for (int dim = kLast - 1; dim >= 0; --dim) {
      if (!full) continue;
      ++at.index[dim];
      at.offset += layout.stride[dim];
      full = at.index[dim] == layout.size[dim];
      if (full) {
        at.index[dim] = 0;
        at.offset -= layout.size[dim] * layout.stride[dim];
      }
    }
  }
}

// Four values that are read or written at once, at an address that is a multiple of 16 bytes.
struct alignas(16) Quad {
  float value[kBlockElements];
};

// Memory that no kernel writes while it runs.
GUDA_FAST_DEVICE float read(const float* from) {
#if defined(__CUDA_ARCH__)
  return __ldg(from);
#else
  return *from;
#endif
}

GUDA_FAST_DEVICE Quad read_quad(const float* from) {
#if defined(__CUDA_ARCH__)
  const float4 quad = __ldg(reinterpret_cast<const float4*>(from));
  return {{quad.x, quad.y, quad.z, quad.w}};
#else
  return *reinterpret_cast<const Quad*>(from);
#endif
}

// Samples in float32. `quads`: contiguous, and every row begins at a multiple of 16 bytes.
template <typename T>
struct Samples {
  T* data;
  std::int64_t row_stride;
  Layout layout;
  bool quads;
};

struct Rows {
  const std::int64_t* query_index;
  const std::int64_t* query_id;  // the bits of the unsigned id
  const std::int64_t* timestep;
  const std::int64_t* sample;
  const float* x0_scale;
  const float* eps_scale;
  std::uint64_t seed;
  bool antithetic;
};

struct Row {
  NoiseStream stream;
  const float* x0;  // null where x0_scale is 0: zero times inf or nan must not reach the result
  float x0_scale, eps_scale;
};

GUDA_FAST_DEVICE Row read_row(const Rows& rows, const Samples<const float>& x0, std::int64_t row) {
  const std::int64_t sample = rows.sample[row];
  const bool negated = rows.antithetic && sample % 2 != 0;
  const float x0_scale = rows.x0_scale[row], eps_scale = rows.eps_scale[row];
  return {noise_stream(rows.seed, rows.query_id[row], rows.timestep[row], negated ? sample - 1 : sample),
          x0_scale != 0.0f ? x0.data + rows.query_index[row] * x0.row_stride : nullptr, x0_scale,
          negated ? -eps_scale : eps_scale};
}

// x0_scale x0 + eps_scale eps of the elements from 4 block on, of which `left` (at least 1) exist: two
// products and a sum. What lies past the end is noise alone.
GUDA_FAST_DEVICE Quad noised(const Row& row, const Samples<const float>& samples, std::int64_t block,
                             std::int64_t left) {
  const std::int64_t element = block * kBlockElements;
  Quad x0 = {};
  if (row.x0 != nullptr && samples.quads && left >= kBlockElements) {
    x0 = read_quad(row.x0 + element);
  } else if (row.x0 != nullptr) {
    Position at = position(samples.layout, element);
    for (int i = 0; i < kBlockElements; ++i) {
      if (i < left) x0.value[i] = read(row.x0 + at.offset);
      advance(samples.layout, at, 1);
    }
  }
  const Normals eps = normals(row.stream, static_cast<std::uint32_t>(block));
  Quad result;
  for (int i = 0; i < kBlockElements; ++i) {
    const float noise = eps.value[i] * row.eps_scale;
    result.value[i] = row.x0 != nullptr ? x0.value[i] * row.x0_scale + noise : noise;
  }
  return result;
}

}  // namespace guda_fast::kernels
