/* x · weightᵀ + bias for packed weights. Included once for each variant: see kernels.c.
 *
 * With few rows a product takes as long as reading its weights. So they lie in the order in which they are read, and are
 * fetched from memory AHEAD bytes before they are needed, which the processor by itself does not do far enough: it stops
 * at the end of every page.
 *
 * Weights lie in panels of PANEL outputs. A panel is a sequence of steps of 128 bytes: all outputs' weights of one
 * input, in bfloat16 those of two inputs, a pair for each output. A tile of at most TILE_ROWS rows keeps its sums in
 * registers while it runs through a panel, with one row as with many, so that a row's bits depend on nothing else.
 */

#ifndef PANEL
#define PANEL 32
#define STEP_BYTES 128
#define AHEAD 12288
#endif

/* Adds the products of one step to the sums: of one input, or in bfloat16 of two. */
INLINE vec NAME(add_products)(Dtype dtype, vec input, vec weight, vec sum)
{
    if (dtype == FLOAT32)
        return NAME(multiply_add)(input, weight, sum);
#ifdef BFLOAT16_INSTRUCTIONS
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)input, (__m512bh)weight);
#else
    /* The lower half of 32 bits, moved up, is the float32 of the first bfloat16; the upper half is that of the second. */
    sum = NAME(multiply_add)((vec)((uvec)input << 16), (vec)((uvec)weight << 16), sum);
    return NAME(multiply_add)((vec)((uvec)input & 0xFFFF0000u), (vec)((uvec)weight & 0xFFFF0000u), sum);
#endif
}

/* Writes rows × PANEL sums, `result_stride` float32 from row to row. `rows` is a constant, so that all loops over it are unrolled and the sums are registers. */
INLINE void NAME(product_tile)(const int rows, Dtype dtype, const char *weights, const float *bias, int64_t steps,
                               const char *x, int64_t x_stride, float *result, int64_t result_stride)
{
    enum { VECTORS = PANEL / LANES };
    vec sums[TILE_ROWS][VECTORS];
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++)
            sums[row][v] = NAME(load)(bias, v * LANES, LANES, FLOAT32);
    for (int64_t step = 0; step < steps; step++) {
        const char *here = weights + step * STEP_BYTES;
        __builtin_prefetch(here + AHEAD);
        __builtin_prefetch(here + AHEAD + STEP_BYTES / 2);
        vec weight[VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++)
            weight[v] = NAME(load)(here, v * LANES, LANES, FLOAT32);
#pragma GCC unroll 16
        for (int row = 0; row < rows; row++) {
            /* One float32, or a pair of bfloat16, in all lanes. */
            float pair;
            memcpy(&pair, x + row * x_stride + step * sizeof pair, sizeof pair);
            vec input = NAME(all)(pair);
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; v++)
                sums[row][v] = NAME(add_products)(dtype, input, weight[v], sums[row][v]);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++)
            NAME(store)(result, row * result_stride + v * LANES, LANES, FLOAT32, sums[row][v]);
}

/* One panel with a tile of rows. */
INLINE void NAME(product_tile_of)(int64_t rows, Dtype dtype, const char *weights, const float *bias, int64_t steps,
                                  const char *x, int64_t x_stride, float *result, int64_t result_stride)
{
#define TILE(count)                                                                                                    \
    case count:                                                                                                        \
        NAME(product_tile)(count, dtype, weights, bias, steps, x, x_stride, result, result_stride);                    \
        break;
    switch (rows) {
        TILE(1)
#if TILE_ROWS > 1
        TILE(2) TILE(3)
#endif
#if TILE_ROWS > 3
        TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11)
#endif
    }
#undef TILE
}

INLINE void NAME(product_panels)(Dtype dtype, const PackedMatrix *matrix, const char *x, int64_t x_stride, int64_t rows,
                                 char *output, int64_t output_stride)
{
    /* Tiles of nearly the same size, for a small one takes longer for each row. */
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    int64_t tile_rows = (rows + tiles - 1) / tiles;
    const char *weights = matrix->weights;
    float result[TILE_ROWS * PANEL];
    for (int64_t column = 0; column < matrix->outputs; column += PANEL) {
        int direct = dtype == FLOAT32 && column + PANEL <= matrix->outputs;
        for (int64_t first = 0; first < rows; first += tile_rows) {
            int64_t count = smaller(tile_rows, rows - first);
            char *tile_output = output + first * output_stride;
            NAME(product_tile_of)(count, dtype, weights, matrix->bias + column, matrix->steps, x + first * x_stride,
                                  x_stride, direct ? (float *)tile_output + column : result,
                                  direct ? output_stride / 4 : PANEL);
            for (int64_t row = 0; row < count && !direct; row++)
                for (int64_t i = column; i < smaller(column + PANEL, matrix->outputs); i += LANES)
                    NAME(store)(tile_output + row * output_stride, i, matrix->outputs - i, dtype,
                                NAME(load)(result, row * PANEL + i - column, LANES, FLOAT32));
        }
        weights += matrix->steps * STEP_BYTES;
    }
}

/* Strides are bytes from one row to the next. */
FUNCTION void NAME(product)(int64_t dtype, const PackedMatrix *matrix, const char *x, int64_t x_stride, int64_t rows,
                            char *output, int64_t output_stride)
{
    if (rows == 0)
        return;
    if (dtype == BFLOAT16)
        NAME(product_panels)(BFLOAT16, matrix, x, x_stride, rows, output, output_stride);
    else
        NAME(product_panels)(FLOAT32, matrix, x, x_stride, rows, output, output_stride);
}
