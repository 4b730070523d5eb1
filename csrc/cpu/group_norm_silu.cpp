#include "cpu/group_norm_silu.h"

#include <algorithm>
#include <type_traits>
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

constexpr const char* kOp = "group_norm_silu";

// Positions of one part of a row: a row's sums are added part by part, whichever thread made which.
constexpr std::int64_t kPart = 256;
constexpr std::int64_t kMaxElements = std::int64_t{1} << 40;

std::int64_t parts_of(const GroupNormSilu& call) { return (call.positions + kPart - 1) / kPart; }

// What a row needs between its two passes. Channels are padded to whole vectors.
struct Workspace {
  std::int64_t width;
  std::vector<double> sums;    // (parts, 2, width): sums and squares
  std::vector<double> groups;  // (3, width): mean, inverse deviation, scratch
  std::vector<float> center, factor, offset;
  std::vector<float> zeros, ones;  // for the vectors that the call leaves out

  explicit Workspace(const GroupNormSilu& call)
      : width((call.channels + kLanes - 1) / kLanes * kLanes),
        sums(size(parts_of(call) * 2)),
        groups(size(3)),
        center(size(1)),
        factor(size(1)),
        offset(size(1)),
        zeros(size(1), 0.0f),
        ones(size(1), 1.0f) {}

  double* part(std::int64_t index) { return sums.data() + index * 2 * width; }

 private:
  std::size_t size(std::int64_t vectors) const { return static_cast<std::size_t>(vectors * width); }
};

class Runner {
 public:
  Runner(const GroupNormSilu& call, Dtype dtype, const Kernels& kernels)
      : call_(call),
        sums_(kernels.channel_sums[static_cast<int>(dtype)]),
        finish_(kernels.finish_norm),
        normalize_(kernels.normalize[static_cast<int>(dtype)][call.silu ? 1 : 0]),
        bytes_(dtype == Dtype::float32 ? 4 : 2) {}

  void sum_part(Workspace& work, std::int64_t row, std::int64_t part) const {
    double* sums = work.part(part);
    std::fill(sums, sums + 2 * work.width, 0.0);
    sums_(sums, sums + work.width, from(row, part), call_.x_layout.position_stride, positions(part),
          call_.channels);
  }

  // From the sums of all parts to y = (x - center) factor + offset, per channel.
  void finish(Workspace& work, std::int64_t row) const {
    double* sum = work.part(0);
    for (std::int64_t part = 1; part < parts_of(call_); ++part) {
      const double* more = work.part(part);
      for (std::int64_t i = 0; i < 2 * work.width; ++i) sum[i] += more[i];
    }
    const std::int64_t model = call_.affine.model_index ? call_.affine.model_index[row] : 0;
    const std::int64_t channels = call_.channels;
    const float *zeros = work.zeros.data(), *ones = work.ones.data();
    double* groups = work.groups.data();
    finish_({sum, sum + work.width, groups, groups + work.width, groups + 2 * work.width,
             row_of(call_.addend, row, zeros), row_of({call_.affine.weight, channels}, model, ones),
             row_of({call_.affine.bias, channels}, model, zeros), row_of(call_.scale, row, zeros),
             row_of(call_.shift, row, zeros), work.center.data(), work.factor.data(), work.offset.data()},
            call_.positions, channels, call_.groups, call_.eps);
  }

  void normalize_part(const Workspace& work, std::int64_t row, std::int64_t part) const {
    const std::int64_t next_row = row + 1 < call_.rows ? call_.x_layout.row_stride : 0;
    normalize_(at(call_.out, call_.out_layout, row, part), call_.out_layout.position_stride, from(row, part),
               call_.x_layout.position_stride, positions(part), call_.channels, work.center.data(),
               work.factor.data(), work.offset.data(), next_row);
  }

 private:
  static const float* row_of(const RowVectors& vectors, std::int64_t row, const float* absent) {
    return vectors.data ? vectors.data + row * vectors.stride : absent;
  }

  std::int64_t positions(std::int64_t part) const { return std::min(kPart, call_.positions - part * kPart); }

  template <typename Void>
  Void* at(Void* data, const Activations& layout, std::int64_t row, std::int64_t part) const {
    using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
    const std::int64_t offset = row * layout.row_stride + part * kPart * layout.position_stride;
    return static_cast<Byte*>(data) + offset * bytes_;
  }

  const void* from(std::int64_t row, std::int64_t part) const {
    return at(call_.x, call_.x_layout, row, part);
  }

  const GroupNormSilu& call_;
  ChannelSums sums_;
  FinishNorm finish_;
  Normalize normalize_;
  std::int64_t bytes_;
};

int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// A thread takes whole rows, so that the second pass finds them in its cache.
void run_rows(const Runner& runner, const GroupNormSilu& call, int threads) {
  const std::int64_t parts = parts_of(call);
  std::vector<Workspace> workspaces(static_cast<std::size_t>(threads), Workspace(call));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t row = 0; row < call.rows; ++row) {
    Workspace& work = workspaces[static_cast<std::size_t>(thread_number())];
    for (std::int64_t part = 0; part < parts; ++part) runner.sum_part(work, row, part);
    runner.finish(work, row);
    for (std::int64_t part = 0; part < parts; ++part) runner.normalize_part(work, row, part);
  }
}

// Too few rows for that: the threads share each row's parts.
void run_parts(const Runner& runner, const GroupNormSilu& call, int threads) {
  const std::int64_t parts = parts_of(call);
  Workspace work(call);
  for (std::int64_t row = 0; row < call.rows; ++row) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t part = 0; part < parts; ++part) runner.sum_part(work, row, part);
    runner.finish(work, row);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t part = 0; part < parts; ++part) runner.normalize_part(work, row, part);
  }
}

Dtype parse_dtype(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  require(name == "bfloat16", kOp, ": dtype must be one of 'float32', 'bfloat16', got '", name, "'");
  return Dtype::bfloat16;
}

void check_pointer(const char* name, const void* pointer, std::uintptr_t alignment) {
  require(reinterpret_cast<std::uintptr_t>(pointer) % alignment == 0, kOp, ": ", name, " must be aligned to ",
          alignment, " bytes");
}

void check_sizes(const GroupNormSilu& call) {
  require(call.rows >= 0, kOp, ": rows must be at least 0, got ", call.rows);
  require(call.positions >= 0, kOp, ": positions must be at least 0, got ", call.positions);
  require(call.channels >= 0, kOp, ": channels must be at least 0, got ", call.channels);
  std::int64_t elements = 1;
  for (const std::int64_t size : {call.rows, call.positions, call.channels}) {
    require(size == 0 || elements <= kMaxElements / size, kOp, ": x must have at most 2**40 elements");
    elements *= std::max(size, std::int64_t{1});
  }
  require(call.groups >= 1 && call.channels % call.groups == 0, kOp, ": groups must divide ", call.channels,
          " channels, got ", call.groups);
  require(call.eps >= 0.0, kOp, ": eps must be at least 0, got ", call.eps);
}

void check_layouts(const GroupNormSilu& call, std::uintptr_t alignment) {
  require(call.out != nullptr, kOp, ": out must not be a null pointer");
  require(call.x != nullptr, kOp, ": x must not be a null pointer");
  check_pointer("out", call.out, alignment);
  check_pointer("x", call.x, alignment);
  const Activations &out = call.out_layout, &x = call.x_layout;
  check_reach(kOp, "out_strides", {call.rows}, {call.positions}, {out.row_stride, out.position_stride});
  check_reach(kOp, "x_strides", {call.rows}, {call.positions}, {x.row_stride, x.position_stride});
  require(call.positions == 1 || out.position_stride >= call.channels, kOp,
          ": out_strides must not let elements overlap");
  require(call.rows == 1 || out.row_stride >= (call.positions - 1) * out.position_stride + call.channels, kOp,
          ": out_strides must not let elements overlap");
}

void check_rows(const char* name, const char* stride_name, const RowVectors& vectors, std::int64_t rows) {
  check_pointer(name, vectors.data, 4);
  if (vectors.data != nullptr) check_reach(kOp, stride_name, {rows}, {}, {vectors.stride});
}

void check_vectors(const GroupNormSilu& call) {
  check_pointer("weight", call.affine.weight, 4);
  check_pointer("bias", call.affine.bias, 4);
  check_rows("addend", "addend_stride", call.addend, call.rows);
  check_rows("scale", "scale_stride", call.scale, call.rows);
  check_rows("shift", "shift_stride", call.shift, call.rows);
  check_pointer("model_index", call.affine.model_index, 8);
  if (call.affine.model_index == nullptr) return;
  for (std::int64_t row = 0; row < call.rows; ++row) {
    const std::int64_t model = call.affine.model_index[row];
    require_index(model >= 0 && model < call.affine.models, kOp, ": model_index must be between 0 and ",
                  call.affine.models - 1, ", got ", model, " in row ", row);
  }
}

}  // namespace

void group_norm_silu(const GroupNormSilu& call, int threads) {
  const Dtype dtype = parse_dtype(call.dtype);
  check_sizes(call);
  check_threads(kOp, threads);
  if (call.rows == 0 || call.positions == 0 || call.channels == 0) return;
  check_layouts(call, dtype == Dtype::float32 ? 4 : 2);
  check_vectors(call);
  // Waking a team costs some microseconds, which is what this many elements cost.
  constexpr std::int64_t kElementsPerThread = 8192;
  const std::int64_t useful = call.rows * call.positions * call.channels / kElementsPerThread;
  threads = static_cast<int>(std::clamp<std::int64_t>(useful, 1, threads));
  const Runner runner(call, dtype, kernels());
  if (call.rows >= threads) {
    run_rows(runner, call, threads);
  } else {
    run_parts(runner, call, static_cast<int>(std::min<std::int64_t>(threads, parts_of(call))));
  }
}

}  // namespace guda_fast::cpu
