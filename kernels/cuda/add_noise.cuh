// out[r] = x0_scale[r] x0[query_index[r]] + eps_scale[r] eps(seed, query_id[r], timestep[r], sample[r])
#pragma once

#include "rows.cuh"

namespace guda_fast::kernels {

// A thread block makes kTile elements of one row, a thread a few blocks of four. They change speed, never
// results.
constexpr int kAddNoiseThreads = 128;
constexpr int kTile = 2048;

struct AddNoise {
  Samples<float> out;
  Samples<const float> x0;
  Rows rows;
  std::int64_t elements;  // of a row
  std::uint32_t tiles;    // of a row
};

// The elements from 4 block on of one row.
GUDA_FAST_DEVICE void add_noise_block(const AddNoise& call, const Row& row, float* out, std::int64_t block) {
  const std::int64_t element = block * kBlockElements, left = call.elements - element;
  const Quad value = noised(row, call.x0, block, left);
  if (call.out.quads && left >= kBlockElements) {
    *reinterpret_cast<Quad*>(out + element) = value;
    return;
  }
  Position at = position(call.out.layout, element);
  for (int i = 0; i < kBlockElements; ++i) {
    if (i < left) out[at.offset] = value.value[i];
    advance(call.out.layout, at, 1);
  }
}

// What one thread of one thread block does.
GUDA_FAST_DEVICE void add_noise_thread(const AddNoise& call, std::uint32_t thread_block, int thread) {
  const std::int64_t number = thread_block / call.tiles;
  const std::int64_t first = std::int64_t{thread_block % call.tiles} * kTile / kBlockElements;
  const Row row = read_row(call.rows, call.x0, number);
  float* out = call.out.data + number * call.out.row_stride;
  for (int block = thread; block < kTile / kBlockElements; block += kAddNoiseThreads) {
    if ((first + block) * kBlockElements >= call.elements) return;
    add_noise_block(call, row, out, first + block);
  }
}

#if defined(__CUDACC__)

static __global__ void __launch_bounds__(kAddNoiseThreads)
    add_noise_kernel(const __grid_constant__ AddNoise call) {
  add_noise_thread(call, blockIdx.x, static_cast<int>(threadIdx.x));
}

// rows * call.tiles thread blocks, at least one: the grid depends on shapes alone.
inline cudaError_t add_noise(const AddNoise& call, std::uint32_t thread_blocks, cudaStream_t stream) {
  add_noise_kernel<<<thread_blocks, kAddNoiseThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

#endif

}  // namespace guda_fast::kernels
