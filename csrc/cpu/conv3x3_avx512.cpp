#define GUDA_FAST_SET avx512
#include "cpu/conv3x3-inl.h"
