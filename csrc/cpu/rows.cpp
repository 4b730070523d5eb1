#include "cpu/rows.h"

#include "common/check.h"

namespace guda_fast::cpu {

constexpr std::int64_t kMaxDraw = 65535;

NoiseStream noise_stream(std::uint64_t seed, std::int64_t query_id, std::int64_t timestep,
                         std::int64_t sample) {
  const auto id = static_cast<std::uint64_t>(query_id);
  return {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32),
          static_cast<std::uint32_t>(timestep) | static_cast<std::uint32_t>(sample) << 16,
          static_cast<std::uint32_t>(id), static_cast<std::uint32_t>(id >> 32)};
}

NoiseStream noise_stream(const Rows& rows, std::int64_t row) {
  const std::int64_t counted = rows.antithetic ? rows.sample[row] & ~std::int64_t{1} : rows.sample[row];
  return noise_stream(rows.seed, rows.query_id[row], rows.timestep[row], counted);
}

float signed_eps_scale(const Rows& rows, std::int64_t row) {
  return rows.antithetic && rows.sample[row] % 2 != 0 ? -rows.eps_scale[row] : rows.eps_scale[row];
}

void check_draw(const char* op, std::int64_t timestep, std::int64_t sample, std::int64_t row) {
  require(timestep >= 0 && timestep <= kMaxDraw, op, ": timestep must be between 0 and 65535, got ", timestep,
          " in row ", row);
  require(sample >= 0 && sample <= kMaxDraw, op, ": sample must be between 0 and 65535, got ", sample,
          " in row ", row);
}

void check_threads(const char* op, int threads) {
  require(threads >= 1, op, ": threads must be at least 1, got ", threads);
}

void check_rows(const char* op, const Rows& rows) {
  for (std::int64_t row = 0; row < rows.rows; ++row) {
    const std::int64_t query = rows.query_index[row];
    require_index(query >= 0 && query < rows.queries, op, ": query_index must be between 0 and ",
                  rows.queries - 1, ", got ", query, " in row ", row);
    check_draw(op, rows.timestep[row], rows.sample[row], row);
  }
}

}  // namespace guda_fast::cpu
