#include "cuda/add_noise.h"
#include "cuda/launch.h"
#include "kernels/cuda/add_noise.cuh"

namespace guda_fast::cuda {

void add_noise(const AddNoiseCall& call, int device, std::uintptr_t stream) {
  constexpr const char* kOp = "add_noise";
  const AddNoiseLayouts layouts = checked(call);
  check_device(kOp, device);
  const std::int64_t elements = layouts.samples.elements, tiles = divide_up(elements, kernels::kTile);
  if (call.rows.rows == 0 || elements == 0) return;
  const std::uint32_t thread_blocks = grid_size(kOp, "rows", call.rows.rows, tiles);
  const DeviceGuard guard(kOp, device);
  check_cuda(kOp, kernels::add_noise({samples(call.out, call.out_strides[0], layouts.out),
                                      samples(call.x0, layouts.samples.query_stride, layouts.samples.layout),
                                      on_device(call.rows), elements, static_cast<std::uint32_t>(tiles)},
                                     thread_blocks, reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace guda_fast::cuda
