#include "cpu/denoising_error.h"

#include <algorithm>

#include "common/check.h"
#include "cpu/add_noise.h"
#include "cpu/dispatch.h"

namespace guda_fast::cpu {
namespace {

// The sums of one chunk of one row, for all models.
template <typename T>
void chunk_sums(ErrorSums* sums, bool paired, const Kernels& kernels, Dtype dtype,
                const Predictions& predictions, const Layout& layout, const float* target, std::int64_t row,
                std::int64_t start, std::int64_t elements) {
  alignas(64) T gathered[kChunk], gathered_base[kChunk];
  const auto chunk_of = [&](std::int64_t model, T* scratch) -> const T* {
    const T* from = static_cast<const T*>(predictions.data) + model * predictions.strides[0] +
                    row * predictions.strides[1];
    if (layout.contiguous()) return from + start;
    layout.gather(scratch, from, start, elements);
    return scratch;
  };
  const auto code = static_cast<int>(dtype);
  const T* base = chunk_of(0, gathered_base);
  sums[0] = {kernels.error_sum[code](base, target, elements), 0.0};
  for (std::int64_t model = 1; model < predictions.models; ++model) {
    const T* prediction = chunk_of(model, gathered);
    if (paired) {
      sums[model] = kernels.paired_sum[code](prediction, base, target, elements);
    } else {
      sums[model] = {kernels.error_sum[code](prediction, target, elements), 0.0};
    }
  }
}

// Adds the chunks in order, so that the total does not depend on which thread made which.
void finish(double* errors, double* paired, const std::vector<ErrorSums>& sums, std::int64_t models,
            std::int64_t rows, std::int64_t chunks, const double* weight) {
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t model = 0; model < models; ++model) {
      ErrorSums total = {0.0, 0.0};
      for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        const ErrorSums& part = sums[static_cast<std::size_t>((row * chunks + chunk) * models + model)];
        total.error += part.error;
        total.paired += part.paired;
      }
      errors[model * rows + row] = weight[row] * total.error;
      if (paired != nullptr) paired[model * rows + row] = model == 0 ? 0.0 : weight[row] * total.paired;
    }
  }
}

}  // namespace

void denoising_error(const DenoisingErrorCall& call, int threads) {
  constexpr const char* kOp = "denoising_error";
  const DenoisingErrorLayouts layouts = checked(call);
  const Samples& samples = layouts.samples;
  const Dtype dtype = layouts.dtype;
  const Rows& rows = call.rows;
  const Predictions& predictions = call.predictions;
  const std::int64_t models = predictions.models;
  const bool paired = call.paired != nullptr;
  check_rows(kOp, rows);
  check_threads(kOp, threads);
  if (models == 0 || rows.rows == 0) return;
  const Kernels& chosen = kernels();
  const std::int64_t chunks = (samples.elements + kChunk - 1) / kChunk;
  std::vector<ErrorSums> sums(static_cast<std::size_t>(rows.rows * chunks * models));
  for_each_chunk(rows.rows, samples.elements, threads, [&](std::int64_t row, std::int64_t chunk) {
    const std::int64_t start = chunk * kChunk, elements = std::min(kChunk, samples.elements - start);
    alignas(64) float target[kChunk];
    noised_chunk(chosen, target, samples, rows, row, start, elements);
    ErrorSums* unit = &sums[static_cast<std::size_t>((row * chunks + chunk) * models)];
    if (dtype == Dtype::float32) {
      chunk_sums<float>(unit, paired, chosen, dtype, predictions, layouts.predictions, target, row, start,
                        elements);
    } else {
      chunk_sums<std::uint16_t>(unit, paired, chosen, dtype, predictions, layouts.predictions, target, row,
                                start, elements);
    }
  });
  finish(call.errors, call.paired, sums, models, rows.rows, chunks, call.weight);
}

}  // namespace guda_fast::cpu
