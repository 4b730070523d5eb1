#include "cuda/denoising_error.h"
#include "cuda/launch.h"
#include "kernels/cuda/denoising_error.cuh"

namespace guda_fast::cuda {
namespace {

constexpr const char* kOp = "denoising_error";

// Whether threads may read whole words: contiguous, every row of every model beginning at a word.
bool reads_words(const Predictions& predictions, const Layout& layout, Dtype dtype) {
  const std::int64_t word = dtype == Dtype::float32 ? 1 : 2;
  return layout.contiguous() && predictions.strides[0] % word == 0 && predictions.strides[1] % word == 0 &&
         aligned(predictions.data, sizeof(float));
}

void check_workspace(const Workspace& workspace, std::int64_t needed) {
  require(workspace.size >= needed, kOp, ": workspace must have at least ", needed, " values, got ",
          workspace.size);
  if (needed > 0) require_pointer(workspace.data, kOp, "workspace");
}

cudaError_t launch(const kernels::DenoisingError& arguments, Dtype dtype, bool packed,
                   std::uint32_t thread_blocks, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::float32:
      return kernels::denoising_error<kernels::Float32>(arguments, packed, thread_blocks, stream);
    case Dtype::bfloat16:
      return kernels::denoising_error<kernels::BFloat16>(arguments, packed, thread_blocks, stream);
    default:
      return kernels::denoising_error<kernels::Float16>(arguments, packed, thread_blocks, stream);
  }
}

}  // namespace

std::int64_t denoising_error_workspace(std::int64_t models, std::int64_t rows, std::int64_t elements,
                                       bool paired) {
  require(models >= 0, kOp, ": models must be at least 0, got ", models);
  require(rows >= 0, kOp, ": rows must be at least 0, got ", rows);
  require(elements >= 0, kOp, ": elements must be at least 0, got ", elements);
  const std::int64_t chunks = divide_up(elements, kernels::kChunk);
  if (chunks <= 1) return 0;
  std::int64_t values = 0;
  require(!__builtin_mul_overflow(models, rows, &values) &&
              !__builtin_mul_overflow(values, chunks, &values) &&
              !__builtin_mul_overflow(values, paired ? 2 : 1, &values),
          kOp, ": models, rows and elements must have a product below 2**63");
  return values;
}

void denoising_error(const DenoisingErrorCall& call, const Workspace& workspace, int device,
                     std::uintptr_t stream) {
  const DenoisingErrorLayouts layouts = checked(call);
  const Predictions& predictions = call.predictions;
  const std::int64_t models = predictions.models, rows = call.rows.rows, elements = layouts.samples.elements;
  const bool paired = call.paired != nullptr;
  const std::int64_t needed = denoising_error_workspace(models, rows, elements, paired);
  check_workspace(workspace, needed);
  check_device(kOp, device);
  if (models == 0 || rows == 0) return;
  const std::int64_t chunks = divide_up(elements, kernels::kChunk);
  const std::uint32_t thread_blocks = chunks > 0 ? grid_size(kOp, "rows", rows, chunks) : 0;
  const std::uint32_t total_blocks =
      grid_size(kOp, "cells", divide_up(models * rows, kernels::kTotalThreads), 1);
  const kernels::DenoisingError arguments = {
      call.errors,
      call.paired,
      workspace.data,
      paired ? workspace.data + needed / 2 : nullptr,
      predictions.data,
      predictions.strides[0],
      predictions.strides[1],
      padded(layouts.predictions),
      samples(call.x0, layouts.samples.query_stride, layouts.samples.layout),
      on_device(call.rows),
      call.weight,
      models,
      rows,
      elements,
      static_cast<std::uint32_t>(chunks)};
  const DeviceGuard guard(kOp, device);
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  if (thread_blocks > 0) {
    const bool packed = reads_words(predictions, layouts.predictions, layouts.dtype);
    check_cuda(kOp, launch(arguments, layouts.dtype, packed, thread_blocks, on));
  }
  if (chunks != 1) check_cuda(kOp, kernels::denoising_error_total(arguments, total_blocks, on));
}

}  // namespace guda_fast::cuda
