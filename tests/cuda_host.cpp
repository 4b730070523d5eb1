// The device code of kernels/cuda compiled as host C++: every thread of every thread block in turn. What it
// leaves out are launches, shared memory and shuffles. Built and called by test_cuda_host.py.
#include <vector>

#include "kernels/cuda/add_noise.cuh"
#include "kernels/cuda/denoising_error.cuh"

using namespace guda_fast::kernels;

namespace {

Layout make_layout(const std::int64_t* sizes, const std::int64_t* strides) {
  Layout layout;
  for (int dim = 0; dim < kMaxDims; ++dim) {
    layout.size[dim] = sizes[dim];
    layout.stride[dim] = strides[dim];
  }
  return layout;
}

// The threads of one unit, and the tree of total().
template <typename Element, bool kPacked, bool kPaired>
void run_unit(const DenoisingError& call, const Chunk& chunk, std::int64_t model, const float* target) {
  using Unit = Lanes<Element, kPacked, kPaired>;
  double error[kLanes], paired[kLanes];
  for (int thread = 0; thread < Unit::kThreads; ++thread) {
    const auto sums = Unit(call, chunk, model, thread * Unit::kCount, target).sums();
    for (int i = 0; i < Unit::kCount; ++i) {
      error[thread * Unit::kCount + i] = sums.error[i];
      paired[thread * Unit::kCount + i] = sums.paired[i];
    }
  }
  for (int stride = kLanes / 2; stride > 0; stride /= 2) {
    for (int lane = 0; lane < stride; ++lane) {
      error[lane] += error[lane + stride];
      paired[lane] += paired[lane + stride];
    }
  }
  store_chunk(call, chunk, model, error[0], paired[0]);
}

template <typename Element, bool kPacked, bool kPaired>
void run(const DenoisingError& call) {
  for (std::uint32_t thread_block = 0; thread_block < call.row_count * call.chunks; ++thread_block) {
    alignas(16) float target[kChunk];
    const Chunk chunk = chunk_of(call, thread_block);
    for (int thread = 0; thread < kErrorThreads; ++thread) make_target(call, chunk, thread, target);
    for (std::int64_t model = 0; model < call.models; ++model) {
      run_unit<Element, kPacked, kPaired>(call, chunk, model, target);
    }
  }
}

template <typename Element>
void run(const DenoisingError& call, bool packed) {
  const bool paired = call.paired != nullptr;
  if (packed && paired) run<Element, true, true>(call);
  if (packed && !paired) run<Element, true, false>(call);
  if (!packed && paired) run<Element, false, true>(call);
  if (!packed && !paired) run<Element, false, false>(call);
}

}  // namespace

extern "C" {

struct HostRows {
  const float* x0;
  std::int64_t x0_row;
  std::int64_t x0_strides[kMaxDims], sizes[kMaxDims];
  const std::int64_t *query_index, *query_id, *timestep, *sample;
  const float *x0_scale, *eps_scale;
  std::uint64_t seed;
  std::int64_t antithetic, rows, elements, quads;
};

void host_words(std::uint32_t* out, std::int64_t blocks, std::int64_t first_block, std::int64_t query_id,
                std::int64_t timestep, std::int64_t sample, std::uint64_t seed) {
  const NoiseStream stream = noise_stream(seed, query_id, timestep, sample);
  for (std::int64_t block = 0; block < blocks; ++block) {
    const Words words = philox(stream, static_cast<std::uint32_t>(first_block + block));
    for (int i = 0; i < kBlockElements; ++i) out[kBlockElements * block + i] = words.word[i];
  }
}

void host_box_muller(float* out, const std::uint32_t* words, std::int64_t pairs) {
  for (std::int64_t i = 0; i < pairs; ++i) {
    box_muller(words[2 * i], words[2 * i + 1], out[2 * i], out[2 * i + 1]);
  }
}

void host_widen(float* out, const std::uint16_t* halves, std::int64_t count, std::int64_t float16) {
  for (std::int64_t i = 0; i < count; ++i) {
    out[i] = float16 != 0 ? Float16::widen(halves[i]) : BFloat16::widen(halves[i]);
  }
}

void host_add_noise(float* out, std::int64_t out_row, const std::int64_t* out_strides, std::int64_t out_quads,
                    const HostRows* rows) {
  const auto tiles = static_cast<std::uint32_t>((rows->elements + kTile - 1) / kTile);
  const AddNoise call = {
      {out, out_row, make_layout(rows->sizes, out_strides), out_quads != 0},
      {rows->x0, rows->x0_row, make_layout(rows->sizes, rows->x0_strides), rows->quads != 0},
      {rows->query_index, rows->query_id, rows->timestep, rows->sample, rows->x0_scale, rows->eps_scale,
       rows->seed, rows->antithetic != 0},
      rows->elements,
      tiles};
  for (std::uint32_t thread_block = 0; thread_block < rows->rows * tiles; ++thread_block) {
    for (int thread = 0; thread < kAddNoiseThreads; ++thread) add_noise_thread(call, thread_block, thread);
  }
}

void host_denoising_error(double* errors, double* paired, const void* predictions,
                          const std::int64_t* prediction_strides, std::int64_t dtype, std::int64_t packed,
                          std::int64_t models, const double* weight, const HostRows* rows) {
  const auto chunks = static_cast<std::uint32_t>((rows->elements + kChunk - 1) / kChunk);
  std::vector<double> parts(models * rows->rows * chunks), paired_parts(parts.size());
  const DenoisingError call = {
      errors,
      paired,
      parts.data(),
      paired_parts.data(),
      predictions,
      prediction_strides[0],
      prediction_strides[1],
      make_layout(rows->sizes, prediction_strides + 2),
      {rows->x0, rows->x0_row, make_layout(rows->sizes, rows->x0_strides), rows->quads != 0},
      {rows->query_index, rows->query_id, rows->timestep, rows->sample, rows->x0_scale, rows->eps_scale,
       rows->seed, rows->antithetic != 0},
      weight,
      models,
      rows->rows,
      rows->elements,
      chunks};
  if (dtype == 0) run<Float32>(call, packed != 0);
  if (dtype == 1) run<BFloat16>(call, packed != 0);
  if (dtype == 2) run<Float16>(call, packed != 0);
  if (chunks != 1) {
    for (std::int64_t cell = 0; cell < models * rows->rows; ++cell) total_cell(call, cell);
  }
}
}
