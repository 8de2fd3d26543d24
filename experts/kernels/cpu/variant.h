/* One variant: the arithmetic for the instruction set that kernels.c has described. */
#include "vectors.h"

#include "product.h"

#include "experts.h"

#include "layer.h"

#undef VARIANT
#undef TARGET
#undef LANES
#undef TILE_ROWS
#undef BFLOAT16_INSTRUCTIONS
#undef vec
#undef ivec
#undef uvec
#undef hvec
