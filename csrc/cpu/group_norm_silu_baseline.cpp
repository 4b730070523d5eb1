#define GUDA_FAST_SET baseline
#include "cpu/group_norm_silu-inl.h"
