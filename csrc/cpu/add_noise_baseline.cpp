#define GUDA_FAST_SET baseline
#include "cpu/add_noise-inl.h"
