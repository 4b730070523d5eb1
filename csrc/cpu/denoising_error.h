// errors[m, r] = weight[r] * sum of (predictions[m, r] - target[r])^2 with the target made on the fly.
#pragma once

#include "common/denoising_error.h"

namespace guda_fast::cpu {

void denoising_error(const DenoisingErrorCall& call, int threads);

}  // namespace guda_fast::cpu
