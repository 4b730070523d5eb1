#include "cpu/add_noise.h"

#include <algorithm>

#include "common/check.h"
#include "cpu/dispatch.h"

namespace guda_fast::cpu {

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
  kernels.add_noise(out, x0, rows.x0_scale[row], signed_eps_scale(rows, row), noise_stream(rows, row),
                    static_cast<std::uint32_t>(start / 4), elements);
}

void add_noise(const AddNoiseCall& call, int threads) {
  constexpr const char* kOp = "add_noise";
  const AddNoiseLayouts layouts = checked(call);
  const Samples& samples = layouts.samples;
  const Rows& rows = call.rows;
  check_rows(kOp, rows);
  check_threads(kOp, threads);
  if (rows.rows * samples.elements == 0) return;
  const Kernels& chosen = kernels();
  for_each_chunk(rows.rows, samples.elements, threads, [&](std::int64_t row, std::int64_t chunk) {
    const std::int64_t start = chunk * kChunk, elements = std::min(kChunk, samples.elements - start);
    float* to = call.out + row * call.out_strides[0];
    if (layouts.out.contiguous()) {
      noised_chunk(chosen, to + start, samples, rows, row, start, elements);
    } else {
      alignas(64) float noised[kChunk];
      noised_chunk(chosen, noised, samples, rows, row, start, elements);
      layouts.out.scatter(to, noised, start, elements);
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
