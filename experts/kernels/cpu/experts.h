/* The experts of a layer: pairs of a token and an expert. Included once for each variant: see kernels.c. */

/* Sorts the pairs of a token and an expert by expert, those of one expert by token, and copies their rows.
 *
 * index_TK: the expert of every pair, below 0 for none. starts_E, one more than there are experts, is written: where
 * each expert's pairs begin, and where the last one's end. pair_P is written: t · K + k of each pair that has an expert.
 * x_PD is written: the row of each such pair.
 */
PART int64_t NAME(gather_pairs)(int64_t dtype, const int64_t *index_TK, int64_t tokens, int64_t top_k, int64_t experts,
                                const char *x_TD, int64_t hidden_size, int64_t *starts_E, int64_t *pair_P, char *x_PD)
{
    int64_t row_bytes = hidden_size * element_size(dtype);
    memset(starts_E, 0, (experts + 1) * sizeof *starts_E);
    for (int64_t pair = 0; pair < tokens * top_k; pair++) {
        if (index_TK[pair] >= experts)
            return NO_SUCH_EXPERT;
        if (index_TK[pair] >= 0)
            starts_E[index_TK[pair] + 1]++;
    }
    for (int64_t expert = 0; expert < experts; expert++)
        starts_E[expert + 1] += starts_E[expert];
    /* Each expert's start moves on to its end, which is where the next one began, and is put back below. */
    for (int64_t pair = 0; pair < tokens * top_k; pair++) {
        if (index_TK[pair] < 0)
            continue;
        int64_t place = starts_E[index_TK[pair]]++;
        pair_P[place] = pair;
        memcpy(x_PD + place * row_bytes, x_TD + pair / top_k * row_bytes, row_bytes);
    }
    for (int64_t expert = experts; expert > 0; expert--)
        starts_E[expert] = starts_E[expert - 1];
    starts_E[0] = 0;
    return OK;
}

INLINE void NAME(swiglu_rows)(Dtype dtype, const char *gate_TF, const char *up_TF, int64_t rows, int64_t columns,
                              int64_t inner_size, char *inner_TF)
{
    for (int64_t t = 0; t < rows; t++) {
        const char *gate_F = at(gate_TF, t * columns, dtype);
        const char *up_F = at(up_TF, t * columns, dtype);
        char *inner_F = at_mutable(inner_TF, t * inner_size, dtype);
        for (int64_t f = 0; f < inner_size; f += LANES) {
            int64_t left = inner_size - f;
            vec gate = NAME(load)(gate_F, f, left, dtype);
            vec activated = NAME(rounded)(gate * NAME(sigmoid)(gate), dtype);
            NAME(store)(inner_F, f, left, dtype, activated * NAME(load)(up_F, f, left, dtype));
        }
    }
}

/* silu(gate) · up of columns that one product computed, rounded before and after the multiplication.
 *
 * projected_TF has so many columns, of which the gate's and the up's begin at the given ones; inner_TF is written.
 */
FUNCTION void NAME(swiglu)(int64_t dtype, const char *projected_TF, int64_t rows, int64_t columns, int64_t gate_column,
                           int64_t up_column, int64_t inner_size, char *inner_TF)
{
    const char *gate_TF = at(projected_TF, gate_column, dtype), *up_TF = at(projected_TF, up_column, dtype);
    if (dtype == BFLOAT16)
        NAME(swiglu_rows)(BFLOAT16, gate_TF, up_TF, rows, columns, inner_size, inner_TF);
    else
        NAME(swiglu_rows)(FLOAT32, gate_TF, up_TF, rows, columns, inner_size, inner_TF);
}

INLINE void NAME(add_pairs_rows)(Dtype dtype, const char *output_PD, const int64_t *pair_P, int64_t pairs,
                                 const char *weight_TK, int64_t top_k, int64_t tokens, int64_t hidden_size,
                                 float *total_TD, char *sum_TD)
{
    memset(total_TD, 0, tokens * hidden_size * sizeof *total_TD);
    for (int64_t place = 0; place < pairs; place++) {
        vec weight = NAME(all)(NAME(load_scalar)(weight_TK, pair_P[place], dtype));
        const char *output_D = at(output_PD, place * hidden_size, dtype);
        float *total_D = total_TD + pair_P[place] / top_k * hidden_size;
        for (int64_t d = 0; d < hidden_size; d += LANES) {
            int64_t left = hidden_size - d;
            vec weighted = NAME(rounded)(NAME(load)(output_D, d, left, dtype) * weight, dtype);
            NAME(store)(total_D, d, left, FLOAT32, NAME(load)(total_D, d, left, FLOAT32) + weighted);
        }
    }
    for (int64_t d = 0; d < tokens * hidden_size; d += LANES) {
        int64_t left = tokens * hidden_size - d;
        NAME(store)(sum_TD, d, left, dtype, NAME(load)(total_TD, d, left, FLOAT32));
    }
}

/* Adds up each token's weighted experts in the order of the pairs, which are as `gather_pairs` gave them.
 *
 * A weighted output is rounded; the sum is taken in float32. sum_TD is written.
 */
PART int64_t NAME(add_pairs)(int64_t dtype, const char *output_PD, const int64_t *pair_P, int64_t pairs,
                             const char *weight_TK, int64_t top_k, int64_t tokens, int64_t hidden_size, char *sum_TD)
{
    float *total_TD = malloc(tokens * hidden_size * sizeof *total_TD + 1);
    if (total_TD == NULL)
        return OUT_OF_MEMORY;
    if (dtype == BFLOAT16)
        NAME(add_pairs_rows)(BFLOAT16, output_PD, pair_P, pairs, weight_TK, top_k, tokens, hidden_size, total_TD, sum_TD);
    else
        NAME(add_pairs_rows)(FLOAT32, output_PD, pair_P, pairs, weight_TK, top_k, tokens, hidden_size, total_TD, sum_TD);
    free(total_TD);
    return OK;
}

/* All experts of a layer: gather, two products for each expert with SwiGLU between them, and the weighted sum.
 *
 * gate_up_E: gate and up of each expert as one matrix; down_E: its down. inner_size: columns of the gate, and of the up.
 */
FUNCTION int64_t NAME(compute_experts)(int64_t dtype, const int64_t *index_TK, int64_t tokens, int64_t top_k,
                                       const char *x_TD, int64_t hidden_size, const char *weight_TK,
                                       const PackedMatrix *gate_up_E, const PackedMatrix *down_E, int64_t experts,
                                       int64_t inner_size, char *sum_TD)
{
    int64_t pairs = tokens * top_k, size = element_size(dtype), result = OUT_OF_MEMORY;
    int64_t row_bytes = hidden_size * size, projected_bytes = 2 * inner_size * size, inner_bytes = inner_size * size;
    int64_t *starts_E = malloc((experts + 1 + pairs) * sizeof *starts_E);
    char *x_PD = malloc(pairs * (row_bytes + projected_bytes + inner_bytes) + 1);
    if (starts_E != NULL && x_PD != NULL) {
        int64_t *pair_P = starts_E + experts + 1;
        char *projected_PF = x_PD + pairs * row_bytes, *inner_PF = projected_PF + pairs * projected_bytes;
        result = NAME(gather_pairs)(dtype, index_TK, tokens, top_k, experts, x_TD, hidden_size, starts_E, pair_P, x_PD);
        if (result == OK) {
            for (int64_t expert = 0; expert < experts; expert++) {
                int64_t first = starts_E[expert], rows = starts_E[expert + 1] - first;
                NAME(product)(dtype, &gate_up_E[expert], x_PD + first * row_bytes, row_bytes, rows,
                              projected_PF + first * projected_bytes, projected_bytes);
            }
            pairs = starts_E[experts];
            NAME(swiglu)(dtype, projected_PF, pairs, 2 * inner_size, 0, inner_size, inner_size, inner_PF);
            for (int64_t expert = 0; expert < experts; expert++) {
                int64_t first = starts_E[expert], rows = starts_E[expert + 1] - first;
                /* The inputs are not needed any more. */
                NAME(product)(dtype, &down_E[expert], inner_PF + first * inner_bytes, inner_bytes, rows,
                              x_PD + first * row_bytes, row_bytes);
            }
            result = NAME(add_pairs)(dtype, x_PD, pair_P, pairs, weight_TK, top_k, tokens, hidden_size, sum_TD);
        }
    }
    free(starts_E);
    free(x_PD);
    return result;
}
