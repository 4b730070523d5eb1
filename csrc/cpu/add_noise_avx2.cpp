#define GUDA_FAST_SET avx2
#include "cpu/add_noise-inl.h"
