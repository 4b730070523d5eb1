#include "common/layout.h"

#include <limits>

#include "common/check.h"

namespace guda_fast {

// One 32-bit counter word numbers the blocks of four elements.
constexpr std::int64_t kMaxElements = std::int64_t{1} << 34;

std::int64_t checked_elements(const char* op, const std::vector<std::int64_t>& shape) {
  require(!shape.empty() && shape.size() <= kMaxDims, op, ": shape must have 1 to ", kMaxDims,
          " dimensions, got ", shape.size());
  std::int64_t elements = 1;
  for (const std::int64_t size : shape) {
    require(size >= 0, op, ": shape must have no negative size, got ", size);
    require(size == 0 || elements <= kMaxElements / size, op, ": shape must have at most 2**34 elements");
    elements *= size;
  }
  return elements;
}

void check_reach(const char* op, const char* name, const std::vector<std::int64_t>& outer,
                 const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides) {
  constexpr std::int64_t kFarthest = std::numeric_limits<std::int64_t>::max() / 16;
  std::int64_t reach = 0;
  for (std::size_t dim = 0; dim < strides.size(); ++dim) {
    const std::int64_t size = dim < outer.size() ? outer[dim] : shape[dim - outer.size()];
    if (size <= 1) continue;
    std::int64_t span = 0;
    const bool fits =
        !__builtin_mul_overflow(size - 1, strides[dim], &span) && span <= kFarthest && span >= -kFarthest;
    reach += fits ? (span < 0 ? -span : span) : 0;
    require(fits && reach <= kFarthest, op, ": ", name, " must reach at most 2**59 elements");
  }
}

Layout::Layout(const char* op, const char* name, const std::vector<std::int64_t>& outer,
               const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides) {
  require(strides.size() == outer.size() + shape.size(), op, ": ", name, " must have ",
          outer.size() + shape.size(), " entries, got ", strides.size());
  check_reach(op, name, outer, shape, strides);
  for (std::size_t dim = 0; dim < shape.size(); ++dim) {
    const std::int64_t size = shape[dim], stride = strides[outer.size() + dim];
    if (size == 1) continue;
    if (dims_ > 0 && strides_[dims_ - 1] == stride * size) {
      sizes_[dims_ - 1] *= size;
      strides_[dims_ - 1] = stride;
    } else {
      sizes_[dims_] = size;
      strides_[dims_++] = stride;
    }
  }
  if (dims_ == 0) {
    sizes_[0] = 1;
    strides_[0] = 1;
    dims_ = 1;
  }
}

bool Layout::repeats() const {
  for (int dim = 0; dim < dims_; ++dim) {
    if (sizes_[dim] > 1 && strides_[dim] == 0) return true;
  }
  return false;
}

}  // namespace guda_fast
