// The element types that natively computed activations and predictions have.
#pragma once

namespace guda_fast {

enum class Dtype { float32 = 0, bfloat16 = 1, float16 = 2 };
constexpr int kDtypes = 3;

}  // namespace guda_fast
