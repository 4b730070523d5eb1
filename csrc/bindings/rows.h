// The rows of both noise ops, from a call's arguments.
#pragma once

#include "bindings/register.h"
#include "common/rows.h"

namespace guda_fast::bindings {

inline Rows make_rows(std::int64_t rows, std::int64_t queries, Address query_index, Address query_id,
                      Address timestep, Address sample, Address x0_scale, Address eps_scale,
                      std::uint64_t seed, bool antithetic) {
  return {rows,
          queries,
          pointer<const std::int64_t>(query_index),
          pointer<const std::int64_t>(query_id),
          pointer<const std::int64_t>(timestep),
          pointer<const std::int64_t>(sample),
          pointer<const float>(x0_scale),
          pointer<const float>(eps_scale),
          seed,
          antithetic};
}

}  // namespace guda_fast::bindings
