#define GUDA_FAST_SET avx2
#include "cpu/denoising_error-inl.h"
