#include "cpu/conv3x3.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "common/check.h"
#include "common/layout.h"
#include "cpu/dispatch.h"
#include "cpu/rows.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace guda_fast::cpu {
namespace {

constexpr const char* kOp = "conv3x3";
constexpr std::int64_t kMaxElements = std::int64_t{1} << 40;
constexpr std::align_val_t kVector{4 * kLanes};

struct Free {
  void operator()(float* memory) const { ::operator delete(memory, kVector); }
};
using Floats = std::unique_ptr<float, Free>;

Floats allocate(std::int64_t elements) {
  return Floats(
      static_cast<float*>(::operator new(static_cast<std::size_t>(elements) * sizeof(float), kVector)));
}

// Transformed tiles and products of a block: what a thread works on, of a size that its cache holds. A line
// lies between points, which would otherwise all fall on the same places of the cache.
struct Workspace {
  std::int64_t tiles, tiles_point, products_point;
  Floats memory;
  float *v, *m;

  Workspace(const Conv3x3& call, std::int64_t count)
      : tiles(count),
        tiles_point(count * call.inputs + kLanes),
        products_point(count * call.outputs + kLanes),
        memory(allocate(kPoints * (tiles_point + products_point))),
        v(memory.get()),
        m(v + kPoints * tiles_point) {}
};

int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

class Runner {
 public:
  Runner(const Conv3x3& call, const Kernels& kernels)
      : call_(call),
        kernels_(kernels),
        across_((call.width + 1) / 2),
        down_((call.height + 1) / 2),
        weight_(allocate(kPoints * call.inputs * call.outputs)),
        zeros_(static_cast<std::size_t>(std::max(call.inputs, call.outputs)), 0.0f) {}

  std::int64_t tiles() const { return call_.rows * down_ * across_; }

  void transform_weights(std::int64_t first, std::int64_t last) const {
    kernels_.transform_weights(weight_.get(), call_.weight, first, last, call_.outputs, call_.inputs);
  }

  // The tiles from `first` on; those behind the last one are zeros.
  void run_block(const Workspace& work, std::int64_t first) const {
    const std::int64_t count = std::min(work.tiles, tiles() - first);
    const std::int64_t padded = (count + kTileStep - 1) / kTileStep * kTileStep;
    const float* from[kPoints];
    Place place = place_of(first);
    for (std::int64_t i = 0; i < count; ++i, place = next(place)) {
      inputs_of(from, place);
      kernels_.transform_tile(work.v + i * call_.inputs, work.tiles_point, from, call_.inputs);
    }
    std::fill(from, from + kPoints, zeros_.data());
    for (std::int64_t i = count; i < padded; ++i) {
      kernels_.transform_tile(work.v + i * call_.inputs, work.tiles_point, from, call_.inputs);
    }
    kernels_.multiply_points(work.m, work.products_point, work.v, work.tiles_point, weight_.get(), padded,
                             call_.outputs, call_.inputs);
    const float* bias = call_.bias ? call_.bias : zeros_.data();
    place = place_of(first);
    for (std::int64_t i = 0; i < count; ++i, place = next(place)) {
      float* to[4];
      outputs_of(to, place);
      kernels_.gather_tile(to, work.m + i * call_.outputs, work.products_point, bias, call_.outputs);
    }
  }

 private:
  // Of a tile's first output.
  struct Place {
    std::int64_t row, y, x;
  };

  Place place_of(std::int64_t tile) const {
    return {tile / (down_ * across_), 2 * (tile / across_ % down_), 2 * (tile % across_)};
  }

  Place next(Place at) const {
    if ((at.x += 2) < call_.width) return at;
    if ((at.y += 2) < call_.height) return {at.row, at.y, 0};
    return {at.row + 1, 0, 0};
  }

  // Addresses of the 4 x 4 positions, those beyond the edge of zeros.
  void inputs_of(const float** from, const Place& at) const {
    const Maps& strides = call_.x_layout;
    const float* row = call_.x + at.row * strides.row_stride;
    if (at.y > 0 && at.x > 0 && at.y + 2 < call_.height && at.x + 2 < call_.width) {
      row += (at.y - 1) * strides.height_stride + (at.x - 1) * strides.width_stride;
      for (int i = 0; i < kPoints; ++i) {
        from[i] = row + i / 4 * strides.height_stride + i % 4 * strides.width_stride;
      }
      return;
    }
    for (int i = 0; i < kPoints; ++i) {
      const std::int64_t y = at.y + i / 4 - 1, x = at.x + i % 4 - 1;
      const bool inside = y >= 0 && y < call_.height && x >= 0 && x < call_.width;
      from[i] = inside ? row + y * strides.height_stride + x * strides.width_stride : zeros_.data();
    }
  }

  void outputs_of(float** to, const Place& at) const {
    const Maps& strides = call_.out_layout;
    float* corner =
        call_.out + at.row * strides.row_stride + at.y * strides.height_stride + at.x * strides.width_stride;
    const bool right = at.x + 1 < call_.width, below = at.y + 1 < call_.height;
    to[0] = corner;
    to[1] = right ? corner + strides.width_stride : nullptr;
    to[2] = below ? corner + strides.height_stride : nullptr;
    to[3] = right && below ? corner + strides.height_stride + strides.width_stride : nullptr;
  }

  const Conv3x3& call_;
  const Kernels& kernels_;
  std::int64_t across_, down_;
  Floats weight_;
  std::vector<float> zeros_;
};

// As many tiles as keep a block's products in the second-level cache, and enough that the weights are read
// seldom.
std::int64_t tiles_of_block(const Conv3x3& call) {
  constexpr std::int64_t kElements = 1 << 17, kLeast = 64, kMost = 256;
  const std::int64_t fitting = kElements / (kPoints * (call.inputs + call.outputs));
  return std::clamp(fitting / kTileStep * kTileStep, kLeast, kMost);
}

void check_sizes(const Conv3x3& call) {
  require(call.rows >= 0, kOp, ": rows must be at least 0, got ", call.rows);
  require(call.height >= 0, kOp, ": height must be at least 0, got ", call.height);
  require(call.width >= 0, kOp, ": width must be at least 0, got ", call.width);
  require(call.inputs >= 0 && call.inputs % kInputStep == 0, kOp, ": inputs must be a multiple of ",
          kInputStep, ", got ", call.inputs);
  require(call.outputs >= 0 && call.outputs % kOutputStep == 0, kOp, ": outputs must be a multiple of ",
          kOutputStep, ", got ", call.outputs);
  std::int64_t elements = 1;
  for (const std::int64_t size : {call.rows, call.height, call.width, std::max(call.inputs, call.outputs)}) {
    require(size == 0 || elements <= kMaxElements / size, kOp,
            ": x and out must have at most 2**40 elements");
    elements *= std::max(size, std::int64_t{1});
  }
  require(call.inputs == 0 || call.outputs <= kMaxElements / call.inputs, kOp,
          ": weight must have at most 2**40 elements");
}

void check_layouts(const Conv3x3& call) {
  require_pointer(call.out, kOp, "out");
  const auto reach = [&](const char* name, const Maps& maps) {
    check_reach(kOp, name, {call.rows}, {call.height, call.width},
                {maps.row_stride, maps.height_stride, maps.width_stride});
  };
  reach("out_strides", call.out_layout);
  const Maps& out = call.out_layout;
  const std::int64_t position = call.outputs, line = (call.width - 1) * out.width_stride + position;
  const std::int64_t map = (call.height - 1) * out.height_stride + line;
  require((call.width == 1 || out.width_stride >= position) &&
              (call.height == 1 || out.height_stride >= line) && (call.rows == 1 || out.row_stride >= map),
          kOp, ": out_strides must not let elements overlap");
  if (call.inputs == 0) return;
  require_pointer(call.x, kOp, "x");
  require_pointer(call.weight, kOp, "weight");
  reach("x_strides", call.x_layout);
}

}  // namespace

void conv3x3(const Conv3x3& call, int threads) {
  check_sizes(call);
  check_threads(kOp, threads);
  if (call.rows == 0 || call.height == 0 || call.width == 0 || call.outputs == 0) return;
  check_layouts(call);
  if (call.bias != nullptr) require_pointer(call.bias, kOp, "bias");
  const Runner runner(call, kernels());
  const std::int64_t share = (runner.tiles() + threads - 1) / threads;
  const std::int64_t size = std::min(tiles_of_block(call), (share + kTileStep - 1) / kTileStep * kTileStep);
  const std::int64_t blocks = (runner.tiles() + size - 1) / size;
  threads = static_cast<int>(std::clamp<std::int64_t>(blocks, 1, threads));
  std::vector<Workspace> workspaces;
  for (int thread = 0; thread < threads; ++thread) workspaces.emplace_back(call, size);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (std::int64_t o = 0; o < call.outputs; o += kOutputStep) runner.transform_weights(o, o + kOutputStep);
#pragma omp for schedule(static)
    for (std::int64_t block = 0; block < blocks; ++block) {
      runner.run_block(workspaces[static_cast<std::size_t>(thread_number())], block * size);
    }
  }
}

}  // namespace guda_fast::cpu
