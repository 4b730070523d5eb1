#include "common/add_noise.h"

#include "common/check.h"

namespace guda_fast {

AddNoiseLayouts checked(const AddNoiseCall& call) {
  constexpr const char* kOp = "add_noise";
  const Samples samples = checked_samples(kOp, call.x0, call.x0_strides, call.shape, call.rows);
  const Layout out(kOp, "out_strides", {call.rows.rows}, call.shape, call.out_strides);
  if (call.rows.rows > 0 && samples.elements > 0) {
    require_pointer(call.out, kOp, "out");
    require(!out.repeats() && (call.rows.rows == 1 || call.out_strides[0] != 0), kOp,
            ": out_strides must not let elements overlap, got a stride of 0");
  }
  return {samples, out};
}

}  // namespace guda_fast
