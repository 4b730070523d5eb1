// What every CUDA entry point does around its kernels: the device, the launch's size, errors, layouts.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <limits>
#include <stdexcept>

#include "common/check.h"
#include "common/rows.h"
#include "kernels/cuda/rows.cuh"

namespace guda_fast::cuda {

inline void check_device(const char* op, int device) {
  require(device >= 0, op, ": device must be at least 0, got ", device);
}

// pybind11 turns std::runtime_error into RuntimeError.
inline void check_cuda(const char* op, cudaError_t code) {
  if (code == cudaSuccess) return;
  throw std::runtime_error(join(op, ": CUDA: ", cudaGetErrorString(code), " (", cudaGetErrorName(code), ")"));
}

// Makes a device the current one, and the one before it again at the end.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, int device) {
    check_cuda(op, cudaGetDevice(&before_));
    changed_ = before_ != device;
    if (changed_) check_cuda(op, cudaSetDevice(device));
  }
  // Only where it changed: setting a device also makes its context, which takes memory.
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// The thread blocks of a launch: `each` for every one of `count`.
inline std::uint32_t grid_size(const char* op, const char* what, std::int64_t count, std::int64_t each) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  require(count <= kMost / each, op, ": ", what, " must be at most ", kMost / each, " at this size, got ",
          count);
  return static_cast<std::uint32_t>(count * each);
}

inline std::int64_t divide_up(std::int64_t number, std::int64_t by) {
  return number / by + (number % by != 0);
}

inline bool aligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

inline kernels::Layout padded(const Layout& layout) {
  kernels::Layout result = {};
  for (int dim = 0; dim < kernels::kMaxDims; ++dim) {
    const int from = dim - (kernels::kMaxDims - layout.dims());
    result.size[dim] = from < 0 ? 1 : layout.size(from);
    result.stride[dim] = from < 0 ? 0 : layout.stride(from);
  }
  return result;
}

template <typename T>
kernels::Samples<T> samples(T* data, std::int64_t row_stride, const Layout& layout) {
  const bool quads = layout.contiguous() && row_stride % kernels::kBlockElements == 0 &&
                     aligned(data, kernels::kBlockElements * sizeof(T));
  return {data, row_stride, padded(layout), quads};
}

inline kernels::Rows on_device(const Rows& rows) {
  return {rows.query_index, rows.query_id,  rows.timestep, rows.sample,
          rows.x0_scale,    rows.eps_scale, rows.seed,     rows.antithetic};
}

}  // namespace guda_fast::cuda
