/* A decoder layer but for its experts: norms, rotary positions, attention of single tokens over the paged cache, dense
 * MLP and shared expert, and the sum that ends the layer. Included once for each variant: see kernels.c.
 */

INLINE void NAME(normalize_rows)(Dtype dtype, const char *x_TD, const char *weight_D, float epsilon, int64_t rows,
                                 int64_t hidden_size, char *output_TD)
{
    for (int64_t t = 0; t < rows; t++) {
        const char *x_D = at(x_TD, t * hidden_size, dtype);
        char *output_D = at_mutable(output_TD, t * hidden_size, dtype);
        vec squares = {0};
        for (int64_t d = 0; d < hidden_size; d += LANES) {
            vec x = NAME(load)(x_D, d, hidden_size - d, dtype);
            squares = NAME(multiply_add)(x, x, squares);
        }
        float mean_square = NAME(sum_lanes)(squares) / (float)hidden_size;
        vec factor = NAME(all)(1.0f / __builtin_sqrtf(mean_square + epsilon));
        for (int64_t d = 0; d < hidden_size; d += LANES) {
            int64_t left = hidden_size - d;
            vec scaled = NAME(rounded)(NAME(load)(x_D, d, left, dtype) * factor, dtype);
            NAME(store)(output_D, d, left, dtype, NAME(load)(weight_D, d, left, dtype) * scaled);
        }
    }
}

/* RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467), rounded as Qwen2-VL's: before and after the weight. */
FUNCTION void NAME(normalize)(int64_t dtype, const char *x_TD, const char *weight_D, float epsilon, int64_t rows,
                              int64_t hidden_size, char *output_TD)
{
    if (dtype == BFLOAT16)
        NAME(normalize_rows)(BFLOAT16, x_TD, weight_D, epsilon, rows, hidden_size, output_TD);
    else
        NAME(normalize_rows)(FLOAT32, x_TD, weight_D, epsilon, rows, hidden_size, output_TD);
}

/* x · cos + rotate_half(x) · sin of one head; each product is rounded before the sum. */
INLINE void NAME(rotate)(Dtype dtype, const char *x_D, const char *cos_D, const char *sin_D, int64_t head_dim,
                         char *output_D)
{
    int64_t half = head_dim / 2;
    for (int64_t d = 0; d < half; d += LANES) {
        int64_t left = half - d;
        vec low = NAME(load)(x_D, d, left, dtype), high = NAME(load)(x_D, half + d, left, dtype);
        vec low_cos = NAME(rounded)(low * NAME(load)(cos_D, d, left, dtype), dtype);
        vec high_sin = NAME(rounded)(high * NAME(load)(sin_D, d, left, dtype), dtype);
        vec high_cos = NAME(rounded)(high * NAME(load)(cos_D, half + d, left, dtype), dtype);
        vec low_sin = NAME(rounded)(low * NAME(load)(sin_D, half + d, left, dtype), dtype);
        NAME(store)(output_D, d, left, dtype, low_cos - high_sin);
        NAME(store)(output_D, half + d, left, dtype, high_cos + low_sin);
    }
}

INLINE void NAME(rotate_and_store_rows)(Dtype dtype, const AttentionLayer *layer, const StepTokens *step,
                                        const char *qkv_TC, char *query_THD)
{
    int64_t head_dim = layer->head_dim, heads = layer->query_heads, kv_heads = layer->kv_heads;
    for (int64_t t = 0; t < step->tokens; t++) {
        const char *qkv_HD = at(qkv_TC, t * (heads + 2 * kv_heads) * head_dim, dtype);
        const char *cos_D = at(step->cos_TD, t * head_dim, dtype), *sin_D = at(step->sin_TD, t * head_dim, dtype);
        int64_t slot = step->slots_T[t] * kv_heads * head_dim;
        char *query_HD = at_mutable(query_THD, t * heads * head_dim, dtype);
        char *key_HD = at_mutable(layer->keys_SHD, slot, dtype);
        for (int64_t head = 0; head < heads + kv_heads; head++) {
            char *output_HD = head < heads ? query_HD : key_HD;
            int64_t output_head = head < heads ? head : head - heads;
            NAME(rotate)(dtype, at(qkv_HD, head * head_dim, dtype), cos_D, sin_D, head_dim,
                         at_mutable(output_HD, output_head * head_dim, dtype));
        }
        memcpy(at_mutable(layer->values_SHD, slot, dtype), at(qkv_HD, (heads + kv_heads) * head_dim, dtype),
               kv_heads * head_dim * element_size(dtype));
    }
}

/* Rotary positions; new keys and values go into the cache, queries into a tensor of their own.
 *
 * qkv_TC: tokens × (query heads + twice key-value heads) · head_dim. query_THD is written.
 */
FUNCTION void NAME(rotate_and_store)(const AttentionLayer *layer, const StepTokens *step, const char *qkv_TC,
                                     char *query_THD)
{
    if (layer->dtype == BFLOAT16)
        NAME(rotate_and_store_rows)(BFLOAT16, layer, step, qkv_TC, query_THD);
    else
        NAME(rotate_and_store_rows)(FLOAT32, layer, step, qkv_TC, query_THD);
}

/* One head's vectors of `count` successive slots as float32 rows of `width`, which ends with zeros. */
INLINE void NAME(widen_block)(Dtype dtype, const char *cache_SHD, int64_t slot, int64_t count, int64_t head,
                              int64_t kv_heads, int64_t head_dim, int64_t width, float *block_KD)
{
    for (int64_t k = 0; k < count; k++) {
        const char *row_D = at(cache_SHD, ((slot + k) * kv_heads + head) * head_dim, dtype);
        for (int64_t d = 0; d < width; d += LANES)
            NAME(store)(block_KD, k * width + d, LANES, FLOAT32, NAME(load)(row_D, d, head_dim - d, dtype));
    }
}

/* The scores of one query with the keys of one block. Four keys at once, so that their sums do not wait for each
 * other. */
INLINE void NAME(score_block)(const float *query_D, const float *key_KD, int64_t count, int64_t width, float *score_K)
{
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
        const float *key_D = key_KD + k * width;
        vec sum_0 = {0}, sum_1 = {0}, sum_2 = {0}, sum_3 = {0};
        for (int64_t d = 0; d < width; d += LANES) {
            vec query = NAME(load)(query_D, d, LANES, FLOAT32);
            sum_0 = NAME(multiply_add)(query, NAME(load)(key_D, d, LANES, FLOAT32), sum_0);
            sum_1 = NAME(multiply_add)(query, NAME(load)(key_D, width + d, LANES, FLOAT32), sum_1);
            sum_2 = NAME(multiply_add)(query, NAME(load)(key_D, 2 * width + d, LANES, FLOAT32), sum_2);
            sum_3 = NAME(multiply_add)(query, NAME(load)(key_D, 3 * width + d, LANES, FLOAT32), sum_3);
        }
        score_K[k] = NAME(sum_lanes)(sum_0);
        score_K[k + 1] = NAME(sum_lanes)(sum_1);
        score_K[k + 2] = NAME(sum_lanes)(sum_2);
        score_K[k + 3] = NAME(sum_lanes)(sum_3);
    }
    for (; k < count; k++) {
        vec sum = {0};
        for (int64_t d = 0; d < width; d += LANES)
            sum = NAME(multiply_add)(NAME(load)(query_D, d, LANES, FLOAT32),
                                     NAME(load)(key_KD, k * width + d, LANES, FLOAT32), sum);
        score_K[k] = NAME(sum_lanes)(sum);
    }
}

/* Adds the weighted values of one block to one query's sums. */
INLINE void NAME(add_block)(const float *weight_K, const float *value_KD, int64_t count, int64_t width, float *total_D)
{
    for (int64_t d = 0; d < width; d += LANES) {
        vec total = NAME(load)(total_D, d, LANES, FLOAT32);
        for (int64_t k = 0; k < count; k++)
            total = NAME(multiply_add)(NAME(all)(weight_K[k]), NAME(load)(value_KD, k * width + d, LANES, FLOAT32),
                                       total);
        NAME(store)(total_D, d, LANES, FLOAT32, total);
    }
}

/* In place; `room` is the length rounded up to whole vectors, all of which is written. */
INLINE void NAME(softmax)(float *score_K, int64_t length, int64_t room)
{
    for (int64_t k = length; k < room; k++)
        score_K[k] = score_K[0];
    vec highest = NAME(all)(score_K[0]);
    for (int64_t k = 0; k < room; k += LANES) {
        vec score = NAME(load)(score_K, k, LANES, FLOAT32);
        highest = NAME(select)(score > highest, score, highest);
    }
    highest = NAME(all)(NAME(largest_lane)(highest));
    vec total = {0};
    for (int64_t k = 0; k < room; k += LANES) {
        int64_t left = length - k;
        NAME(store)(score_K, k, LANES, FLOAT32, NAME(power_of_e)(NAME(load)(score_K, k, LANES, FLOAT32) - highest));
        /* Without the lanes behind the last score. */
        total = total + NAME(load)(score_K, k, left, FLOAT32);
    }
    vec factor = NAME(all)(1.0f / NAME(sum_lanes)(total));
    for (int64_t k = 0; k < room; k += LANES)
        NAME(store)(score_K, k, LANES, FLOAT32, NAME(load)(score_K, k, LANES, FLOAT32) * factor);
}

/* One token of one sequence: grouped queries, each group with one head of keys and values. */
INLINE void NAME(attend_row)(Dtype dtype, const AttentionLayer *layer, const char *query_HD, const int64_t *blocks_N,
                             int64_t length, float *memory, char *output_HD)
{
    int64_t head_dim = layer->head_dim, block_size = layer->block_size, kv_heads = layer->kv_heads;
    int64_t group = layer->query_heads / kv_heads;
    int64_t width = round_up(head_dim, LANES), room = round_up(length, LANES);
    float *query_GD = memory, *total_GD = query_GD + group * width, *block_KD = total_GD + group * width;
    float *score_GK = block_KD + block_size * width;
    vec scaling = NAME(all)(layer->scaling);
    for (int64_t head = 0; head < kv_heads; head++) {
        for (int64_t g = 0; g < group; g++) {
            const char *query_D = at(query_HD, (head * group + g) * head_dim, dtype);
            for (int64_t d = 0; d < width; d += LANES) {
                vec query = NAME(load)(query_D, d, head_dim - d, dtype) * scaling;
                NAME(store)(query_GD, g * width + d, LANES, FLOAT32, query);
                NAME(store)(total_GD, g * width + d, LANES, FLOAT32, (vec){0});
            }
        }
        for (int64_t start = 0; start < length; start += block_size) {
            int64_t slot = blocks_N[start / block_size] * block_size, count = smaller(block_size, length - start);
            NAME(widen_block)(dtype, layer->keys_SHD, slot, count, head, kv_heads, head_dim, width, block_KD);
            for (int64_t g = 0; g < group; g++)
                NAME(score_block)(query_GD + g * width, block_KD, count, width, score_GK + g * room + start);
        }
        for (int64_t g = 0; g < group; g++)
            NAME(softmax)(score_GK + g * room, length, room);
        for (int64_t start = 0; start < length; start += block_size) {
            int64_t slot = blocks_N[start / block_size] * block_size, count = smaller(block_size, length - start);
            NAME(widen_block)(dtype, layer->values_SHD, slot, count, head, kv_heads, head_dim, width, block_KD);
            for (int64_t g = 0; g < group; g++)
                NAME(add_block)(score_GK + g * room + start, block_KD, count, width, total_GD + g * width);
        }
        for (int64_t g = 0; g < group; g++) {
            char *output_D = at_mutable(output_HD, (head * group + g) * head_dim, dtype);
            for (int64_t d = 0; d < head_dim; d += LANES)
                NAME(store)(output_D, d, head_dim - d, dtype, NAME(load)(total_GD, g * width + d, LANES, FLOAT32));
        }
    }
}

/* The token at `rows_B[b]` of each sequence attends to its sequence's tokens, where they lie in the cache.
 *
 * Paged attention (Kwon et al. 2023, arXiv 2309.06180); sums and softmax in float32. output_THD is written in `rows_B`.
 */
FUNCTION int64_t NAME(attend_decoding)(const AttentionLayer *layer, const StepTokens *step, const char *query_THD,
                                       char *output_THD)
{
    int64_t longest = 0, group = layer->query_heads / layer->kv_heads, width = round_up(layer->head_dim, LANES);
    for (int64_t b = 0; b < step->sequences; b++)
        longest = step->lengths_B[b] > longest ? step->lengths_B[b] : longest;
    if (longest == 0)
        return OK;
    int64_t floats = (2 * group + layer->block_size) * width + group * round_up(longest, LANES);
    float *memory = malloc(floats * sizeof *memory);
    if (memory == NULL)
        return OUT_OF_MEMORY;
    for (int64_t b = 0; b < step->sequences; b++) {
        int64_t row = step->rows_B[b] * layer->query_heads * layer->head_dim;
        const int64_t *blocks_N = step->block_tables_BN + b * step->blocks;
        const char *query_HD = at(query_THD, row, layer->dtype);
        char *output_HD = at_mutable(output_THD, row, layer->dtype);
        if (layer->dtype == BFLOAT16)
            NAME(attend_row)(BFLOAT16, layer, query_HD, blocks_N, step->lengths_B[b], memory, output_HD);
        else
            NAME(attend_row)(FLOAT32, layer, query_HD, blocks_N, step->lengths_B[b], memory, output_HD);
    }
    free(memory);
    return OK;
}

/* A layer up to its attention: norm, one product, `rotate_and_store` and `attend_decoding`.
 *
 * hidden_TD: the layer's input. query_THD is written, and attended_THD in `rows_B`.
 */
FUNCTION int64_t NAME(attend_to_sequences)(const AttentionLayer *layer, const StepTokens *step,
                                           const char *hidden_TD, char *query_THD, char *attended_THD)
{
    int64_t size = element_size(layer->dtype), row_bytes = layer->hidden_size * size;
    int64_t qkv_bytes = (layer->query_heads + 2 * layer->kv_heads) * layer->head_dim * size;
    char *x_TD = malloc(step->tokens * (row_bytes + qkv_bytes) + 1);
    if (x_TD == NULL)
        return OUT_OF_MEMORY;
    char *qkv_TC = x_TD + step->tokens * row_bytes;
    NAME(normalize)(layer->dtype, hidden_TD, layer->norm_before_D, layer->epsilon_before, step->tokens,
                    layer->hidden_size, x_TD);
    NAME(product)(layer->dtype, layer->qkv, x_TD, row_bytes, step->tokens, qkv_TC, qkv_bytes);
    NAME(rotate_and_store)(layer, step, qkv_TC, query_THD);
    free(x_TD);
    return NAME(attend_decoding)(layer, step, query_THD, attended_THD);
}

INLINE void NAME(add_rows)(Dtype dtype, const char *x_N, char *sum_N, int64_t count)
{
    for (int64_t n = 0; n < count; n += LANES) {
        int64_t left = count - n;
        NAME(store)(sum_N, n, left, dtype, NAME(load)(x_N, n, left, dtype) + NAME(load)(sum_N, n, left, dtype));
    }
}

/* A layer from its attention to its experts: one product, the residual sum, and the norm.
 *
 * residual_TD is written: the sum. x_TD is written: what the norm makes of it.
 */
FUNCTION void NAME(project_and_normalize)(const AttentionLayer *layer, int64_t tokens, const char *hidden_TD,
                                          const char *attended_THD, char *residual_TD, char *x_TD)
{
    int64_t size = element_size(layer->dtype), count = tokens * layer->hidden_size;
    NAME(product)(layer->dtype, layer->output, attended_THD, layer->query_heads * layer->head_dim * size, tokens,
                  residual_TD, layer->hidden_size * size);
    if (layer->dtype == BFLOAT16)
        NAME(add_rows)(BFLOAT16, hidden_TD, residual_TD, count);
    else
        NAME(add_rows)(FLOAT32, hidden_TD, residual_TD, count);
    NAME(normalize)(layer->dtype, residual_TD, layer->norm_after_D, layer->epsilon_after, tokens, layer->hidden_size,
                    x_TD);
}

/* Dense MLP and shared expert, the latter before its gate.
 *
 * projected_TF is written: what the layer's first product computes. dense_TD and shared_TD are written.
 */
FUNCTION int64_t NAME(dense_and_shared)(const DenseLayer *layer, int64_t tokens, const char *x_TD, char *projected_TF,
                                        char *dense_TD, char *shared_TD)
{
    int64_t dtype = layer->dtype, size = element_size(dtype), row_bytes = layer->hidden_size * size;
    int64_t columns = layer->inputs->outputs, dense_size = layer->dense_size, shared_size = layer->shared_size;
    int64_t larger = dense_size > shared_size ? dense_size : shared_size;
    char *inner_TF = malloc(tokens * larger * size + 1);
    if (inner_TF == NULL)
        return OUT_OF_MEMORY;
    NAME(product)(dtype, layer->inputs, x_TD, row_bytes, tokens, projected_TF, columns * size);
    NAME(swiglu)(dtype, projected_TF, tokens, columns, 0, dense_size, dense_size, inner_TF);
    NAME(product)(dtype, layer->dense_down, inner_TF, dense_size * size, tokens, dense_TD, row_bytes);
    NAME(swiglu)(dtype, projected_TF, tokens, columns, 2 * dense_size, 2 * dense_size + shared_size, shared_size,
                 inner_TF);
    NAME(product)(dtype, layer->shared_down, inner_TF, shared_size * size, tokens, shared_TD, row_bytes);
    free(inner_TF);
    return OK;
}

INLINE void NAME(mix_rows)(Dtype dtype, const char *hidden_TD, const char *routed_TD, const char *shared_TD,
                           const char *dense_TD, const char *projected_TF, int64_t columns, int64_t factor_column,
                           int64_t rows, int64_t hidden_size, char *output_TD)
{
    for (int64_t t = 0; t < rows; t++) {
        int64_t factors = t * columns + factor_column;
        float factor = NAME(load_scalar)(projected_TF, factors, dtype);
        float routed_coefficient = NAME(load_scalar)(projected_TF, factors + 1, dtype);
        float dense_coefficient = NAME(load_scalar)(projected_TF, factors + 2, dtype);
        float highest = routed_coefficient > dense_coefficient ? routed_coefficient : dense_coefficient;
        float routed_power = NAME(power_of_e)(NAME(all)(routed_coefficient - highest))[0];
        float dense_power = NAME(power_of_e)(NAME(all)(dense_coefficient - highest))[0];
        vec shared_gate = NAME(rounded)(NAME(sigmoid)(NAME(all)(factor)), dtype);
        vec routed_share = NAME(rounded)(NAME(all)(routed_power / (routed_power + dense_power)), dtype);
        vec dense_share = NAME(rounded)(NAME(all)(dense_power / (routed_power + dense_power)), dtype);
        for (int64_t d = 0; d < hidden_size; d += LANES) {
            int64_t i = t * hidden_size + d, left = hidden_size - d;
            vec shared = NAME(rounded)(shared_gate * NAME(load)(shared_TD, i, left, dtype), dtype);
            vec mixture = NAME(rounded)(NAME(load)(routed_TD, i, left, dtype) + shared, dtype);
            vec from_routed = NAME(rounded)(routed_share * mixture, dtype);
            vec from_dense = NAME(rounded)(dense_share * NAME(load)(dense_TD, i, left, dtype), dtype);
            vec added = NAME(rounded)(from_routed + from_dense, dtype);
            NAME(store)(output_TD, i, left, dtype, NAME(load)(hidden_TD, i, left, dtype) + added);
        }
    }
}

/* What ends a layer: residual + share₀ · (routed + σ(factor) · shared) + share₁ · dense, with softmax shares.
 *
 * projected_TF has so many columns, of which three from `factor_column` on are the shared expert's gate and the two
 * mixing coefficients. output_TD is written.
 */
FUNCTION void NAME(mix)(int64_t dtype, const char *hidden_TD, const char *routed_TD, const char *shared_TD,
                        const char *dense_TD, const char *projected_TF, int64_t columns, int64_t factor_column,
                        int64_t rows, int64_t hidden_size, char *output_TD)
{
    if (dtype == BFLOAT16)
        NAME(mix_rows)(BFLOAT16, hidden_TD, routed_TD, shared_TD, dense_TD, projected_TF, columns, factor_column, rows,
                       hidden_size, output_TD);
    else
        NAME(mix_rows)(FLOAT32, hidden_TD, routed_TD, shared_TD, dense_TD, projected_TF, columns, factor_column, rows,
                       hidden_size, output_TD);
}
