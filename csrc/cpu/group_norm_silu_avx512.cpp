#define GUDA_FAST_SET avx512
#include "cpu/group_norm_silu-inl.h"
