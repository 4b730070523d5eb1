#define GUDA_FAST_SET avx512
#include "cpu/attention-inl.h"
