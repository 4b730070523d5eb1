#define GUDA_FAST_SET avx2
#include "cpu/group_norm_silu-inl.h"
