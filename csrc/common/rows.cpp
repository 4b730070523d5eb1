#include "common/rows.h"

#include <limits>

#include "common/check.h"

namespace guda_fast {

Samples checked_samples(const char* op, const float* x0, const std::vector<std::int64_t>& x0_strides,
                        const std::vector<std::int64_t>& shape, const Rows& rows) {
  const std::int64_t elements = checked_elements(op, shape);
  require(rows.rows >= 0, op, ": rows must be at least 0, got ", rows.rows);
  require(rows.queries >= 0, op, ": queries must be at least 0, got ", rows.queries);
  require(elements == 0 || rows.rows <= std::numeric_limits<std::int64_t>::max() / elements, op,
          ": rows must have at most 2**63 - 1 elements together, got ", rows.rows, " rows of ", elements);
  const Layout layout(op, "x0_strides", {rows.queries}, shape, x0_strides);
  if (rows.rows > 0) {
    require_pointer(rows.query_index, op, "query_index");
    require_pointer(rows.query_id, op, "query_id");
    require_pointer(rows.timestep, op, "timestep");
    require_pointer(rows.sample, op, "sample");
    require_pointer(rows.x0_scale, op, "x0_scale");
    require_pointer(rows.eps_scale, op, "eps_scale");
    if (elements > 0) require_pointer(x0, op, "x0");
  }
  return {x0, x0_strides[0], layout, elements};
}

}  // namespace guda_fast
