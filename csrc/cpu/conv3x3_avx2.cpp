#define GUDA_FAST_SET avx2
#include "cpu/conv3x3-inl.h"
