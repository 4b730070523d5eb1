#define GUDA_FAST_SET avx512
#include "cpu/denoising_error-inl.h"
