#define GUDA_FAST_SET baseline
#include "cpu/conv3x3-inl.h"
