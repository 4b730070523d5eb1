#define GUDA_FAST_SET baseline
#include "cpu/denoising_error-inl.h"
