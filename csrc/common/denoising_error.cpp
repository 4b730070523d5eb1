#include "common/denoising_error.h"

#include <algorithm>
#include <limits>

#include "common/check.h"

namespace guda_fast {
namespace {

constexpr const char* kOp = "denoising_error";

Dtype parse_dtype(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "bfloat16") return Dtype::bfloat16;
  require(name == "float16", kOp, ": dtype must be one of 'float32', 'bfloat16', 'float16', got '", name,
          "'");
  return Dtype::float16;
}

}  // namespace

DenoisingErrorLayouts checked(const DenoisingErrorCall& call) {
  const Predictions& predictions = call.predictions;
  const Dtype dtype = parse_dtype(predictions.dtype);
  const Samples samples = checked_samples(kOp, call.x0, call.x0_strides, call.shape, call.rows);
  const std::int64_t models = predictions.models, rows = call.rows.rows;
  require(models >= 0, kOp, ": models must be at least 0, got ", models);
  const std::int64_t most = std::numeric_limits<std::int64_t>::max();
  require(models == 0 || rows <= most / models / std::max<std::int64_t>(samples.elements, 1), kOp,
          ": predictions must have at most 2**63 - 1 elements, got ", models, " models and ", rows, " rows");
  const Layout layout(kOp, "prediction_strides", {models, rows}, call.shape, predictions.strides);
  if (models > 0 && rows > 0) {
    require_pointer(call.errors, kOp, "errors");
    require_pointer(call.weight, kOp, "weight");
    if (call.paired != nullptr) require_pointer(call.paired, kOp, "paired");
    if (samples.elements > 0 && dtype == Dtype::float32) {
      require_pointer(static_cast<const float*>(predictions.data), kOp, "predictions");
    } else if (samples.elements > 0) {
      require_pointer(static_cast<const std::uint16_t*>(predictions.data), kOp, "predictions");
    }
  }
  return {dtype, samples, layout};
}

}  // namespace guda_fast
