#define GUDA_FAST_SET avx512
#include "cpu/add_noise-inl.h"
