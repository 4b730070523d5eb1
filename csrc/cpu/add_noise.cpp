#include "cpu/add_noise.h"

#include <algorithm>

#include "common/check.h"
#include "cpu/dispatch.h"

namespace guda_fast::cpu {

Samples checked_samples(const char* op, const float* x0, const std::vector<std::int64_t>& x0_strides,
                        const std::vector<std::int64_t>& shape, const Rows& rows) {
  const std::int64_t elements = checked_elements(op, shape);
  Layout layout(op, "x0_strides", shape, x0_strides, 1);
  check_rows(op, rows);
  require(x0 != nullptr || rows.rows * elements == 0, op, ": x0 must not be a null pointer");
  return {x0, x0_strides[0], layout, elements};
}

void noised_chunk(const Kernels& kernels, float* out, const Samples& samples, const Rows& rows,
                  std::int64_t row, std::int64_t start, std::int64_t elements) {
  alignas(64) float gathered[kChunk];
  const float* x0 = nullptr;
  // A scale of zero means that x0 takes no part: zero times inf or nan must not reach the result.
  if (rows.x0_scale[row] != 0.0f) {
    x0 = samples.x0 + rows.query_index[row] * samples.query_stride;
    if (samples.layout.contiguous()) {
      x0 += start;
    } else {
      samples.layout.gather(gathered, x0, start, elements);
      x0 = gathered;
    }
  }
  kernels.add_noise(out, x0, rows.x0_scale[row], rows.signed_eps_scale(row), rows.stream(row),
                    static_cast<std::uint32_t>(start / 4), elements);
}

void add_noise(float* out, const std::vector<std::int64_t>& out_strides, const float* x0,
               const std::vector<std::int64_t>& x0_strides, const std::vector<std::int64_t>& shape,
               const Rows& rows, int threads) {
  constexpr const char* kOp = "add_noise";
  const Samples samples = checked_samples(kOp, x0, x0_strides, shape, rows);
  const Layout layout(kOp, "out_strides", shape, out_strides, 1);
  check_threads(kOp, threads);
  if (rows.rows * samples.elements == 0) return;
  require(out != nullptr, kOp, ": out must not be a null pointer");
  require(!layout.repeats() && (rows.rows == 1 || out_strides[0] != 0), kOp,
          ": out_strides must not let elements overlap, got a stride of 0");
  const Kernels& chosen = kernels();
  for_each_chunk(rows.rows, samples.elements, threads, [&](std::int64_t row, std::int64_t chunk) {
    const std::int64_t start = chunk * kChunk, elements = std::min(kChunk, samples.elements - start);
    float* to = out + row * out_strides[0];
    if (layout.contiguous()) {
      noised_chunk(chosen, to + start, samples, rows, row, start, elements);
    } else {
      alignas(64) float noised[kChunk];
      noised_chunk(chosen, noised, samples, rows, row, start, elements);
      layout.scatter(to, noised, start, elements);
    }
  });
}

void noise_words(std::uint32_t* out, std::int64_t blocks, std::int64_t first_block, std::int64_t query_id,
                 std::int64_t timestep, std::int64_t sample, std::uint64_t seed) {
  constexpr const char* kOp = "noise_words";
  constexpr std::int64_t kMaxBlocks = std::int64_t{1} << 32;
  require(blocks >= 0, kOp, ": blocks must be at least 0, got ", blocks);
  require(first_block >= 0 && first_block <= kMaxBlocks - blocks, kOp,
          ": first_block must be between 0 and 2**32 - blocks, got ", first_block);
  check_draw(kOp, timestep, sample, 0);
  require(out != nullptr || blocks == 0, kOp, ": out must not be a null pointer");
  kernels().noise_words(out, blocks, static_cast<std::uint32_t>(first_block),
                        noise_stream(seed, query_id, timestep, sample));
}

}  // namespace guda_fast::cpu
