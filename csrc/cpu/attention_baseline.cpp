#define GUDA_FAST_SET baseline
#include "cpu/attention-inl.h"
