#define GUDA_FAST_SET avx2
#include "cpu/attention-inl.h"
