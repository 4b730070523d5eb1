// How the elements of one sample lie in memory, and copies between that and contiguous chunks.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace guda_fast {

constexpr int kMaxDims = 4;

// Sizes and strides in elements, with dimensions that lie next to each other in memory merged.
class Layout {
 public:
  // `strides` begins with those of the outer dimensions, whose sizes are `outer` and which are not
  // part of the layout.
  Layout(const char* op, const char* name, const std::vector<std::int64_t>& outer,
         const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides);

  bool contiguous() const { return dims_ == 1 && strides_[0] == 1; }

  int dims() const { return dims_; }
  std::int64_t size(int dim) const { return sizes_[dim]; }
  std::int64_t stride(int dim) const { return strides_[dim]; }

  // Whether two elements share one address through a stride of zero.
  bool repeats() const;

  // Elements start, start + 1, ... in logical order, to `to`.
  template <typename T>
  void gather(T* to, const T* from, std::int64_t start, std::int64_t elements) const {
    for_each_run(start, elements, [&](std::int64_t offset, std::int64_t stride, std::int64_t length) {
      for (std::int64_t i = 0; i < length; ++i) to[i] = from[offset + i * stride];
      to += length;
    });
  }

  // The inverse.
  template <typename T>
  void scatter(T* to, const T* from, std::int64_t start, std::int64_t elements) const {
    for_each_run(start, elements, [&](std::int64_t offset, std::int64_t stride, std::int64_t length) {
      for (std::int64_t i = 0; i < length; ++i) to[offset + i * stride] = from[i];
      from += length;
    });
  }

 private:
  template <typename Visit>
  void for_each_run(std::int64_t start, std::int64_t elements, const Visit& visit) const {
    std::array<std::int64_t, kMaxDims> index = {};
    for (int dim = dims_ - 1; dim >= 0; --dim) {
      index[dim] = start % sizes_[dim];
      start /= sizes_[dim];
    }
    const int last = dims_ - 1;
    while (elements > 0) {
      std::int64_t offset = 0;
      for (int dim = 0; dim < dims_; ++dim) offset += index[dim] * strides_[dim];
      const std::int64_t length = std::min(elements, sizes_[last] - index[last]);
      visit(offset, strides_[last], length);
      elements -= length;
      index[last] += length;
      for (int dim = last; dim > 0 && index[dim] == sizes_[dim]; --dim) {
        index[dim] = 0;
        ++index[dim - 1];
      }
    }
  }

  int dims_ = 0;
  std::array<std::int64_t, kMaxDims> sizes_ = {}, strides_ = {};
};

// The number of elements of a sample; checks the shape.
std::int64_t checked_elements(const char* op, const std::vector<std::int64_t>& shape);

// Offsets are computed without a check: the farthest, in bytes, must fit in an int64. The strides are those
// of the outer dimensions, then of the shape.
void check_reach(const char* op, const char* name, const std::vector<std::int64_t>& outer,
                 const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides);

}  // namespace guda_fast
