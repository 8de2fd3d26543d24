/* Forgets what one variant defined, before the next. */
#undef VARIANT
#undef TARGET
#undef LANES
#undef TILE_ROWS
#undef BFLOAT16_INSTRUCTIONS
#undef vec
#undef ivec
#undef uvec
#undef hvec
