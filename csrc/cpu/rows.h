// What the C++ kernels need of a call's rows: their noise, checks of their values, and work in chunks.
#pragma once

#include <cstdint>

#include "common/rows.h"
#include "cpu/kernels.h"

namespace guda_fast::cpu {

NoiseStream noise_stream(std::uint64_t seed, std::int64_t query_id, std::int64_t timestep,
                         std::int64_t sample);

NoiseStream noise_stream(const Rows& rows, std::int64_t row);

// With the sign of an antithetic sample, which negates the normals of its even neighbour.
float signed_eps_scale(const Rows& rows, std::int64_t row);

// Checks every row's query_index, timestep and sample.
void check_rows(const char* op, const Rows& rows);

// Both fit in 16 bits of the counter; `row` says where.
void check_draw(const char* op, std::int64_t timestep, std::int64_t sample, std::int64_t row);

void check_threads(const char* op, int threads);

// One unit of work is a chunk of a row; body(row, chunk) runs once for each.
template <typename Body>
void for_each_chunk(std::int64_t rows, std::int64_t elements, int threads, const Body& body) {
  const std::int64_t chunks = (elements + kChunk - 1) / kChunk;
  const std::int64_t units = rows * chunks;
  // Waking a team costs some microseconds, which is what this many elements cost.
  constexpr std::int64_t kElementsPerThread = 8192;
  const std::int64_t useful = rows * elements / kElementsPerThread;
  const int team = static_cast<int>(useful < threads ? (useful > 1 ? useful : 1) : threads);
  static_cast<void>(team);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (std::int64_t unit = 0; unit < units; ++unit) body(unit / chunks, unit % chunks);
}

}  // namespace guda_fast::cpu
