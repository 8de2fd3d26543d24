/* Vectors of LANES float32, and what is done with them. Included once for each variant: see kernels.c.
 *
 * The operators + - * / and comparisons work on whole vectors (GCC's and Clang's vector extensions). A comparison gives
 * all ones where it holds.
 */

#define vec NAME(vec)
#define ivec NAME(ivec)
#define uvec NAME(uvec)
#define hvec NAME(hvec)

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));

/* The number in all lanes. */
INLINE vec NAME(all)(float x) { return x - (vec){0}; }

INLINE vec NAME(select)(ivec condition, vec where_true, vec where_false)
{
    return (vec)((condition & (ivec)where_true) | (~condition & (ivec)where_false));
}

/* a · b + sum, rounded once where the processor can. */
INLINE vec NAME(multiply_add)(vec a, vec b, vec sum)
{
#if LANES == 16
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif LANES == 8
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return a * b + sum;
#endif
}

/* The sum of all lanes: halves, then quarters, and so on. */
INLINE float NAME(sum_lanes)(vec x)
{
#if LANES == 16
    __m512 all = (__m512)x;
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
#elif LANES == 8
    __m256 half = (__m256)x;
#endif
#if LANES >= 8
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
#else
    return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

/* The largest lane; a NaN may be passed over. */
INLINE float NAME(largest_lane)(vec x)
{
    float largest = x[0];
    for (int lane = 1; lane < LANES; lane++)
        largest = x[lane] > largest ? x[lane] : largest;
    return largest;
}

/* 16-bit integers as 32-bit ones, and back: compilers do not find the instructions by themselves. */
INLINE uvec NAME(widen)(hvec x)
{
#if LANES == 16
    return (uvec)_mm512_cvtepu16_epi32((__m256i)x);
#elif LANES == 8
    return (uvec)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, uvec);
#endif
}

INLINE hvec NAME(narrow)(uvec x)
{
#if LANES == 16
    return (hvec)_mm512_cvtepi32_epi16((__m512i)x);
#elif LANES == 8
    __m256i pairs = _mm256_packus_epi32((__m256i)x, (__m256i)x);
    return (hvec)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
#else
    return __builtin_convertvector(x, hvec);
#endif
}

/* The nearest bfloat16, of two equally near ones the even; NaN stays NaN. The instruction takes subnormal numbers for 0. */
INLINE hvec NAME(to_bfloat16)(vec x)
{
#ifdef BFLOAT16_INSTRUCTIONS
    return (hvec)_mm512_cvtneps_pbh((__m512)x);
#else
    uvec bits = (uvec)x;
    uvec nearest = bits + 0x7FFF + (bits >> 16 & 1);
    return NAME(narrow)((uvec)NAME(select)(x == x, (vec)nearest, (vec)((uvec){0} + 0x7FC00000u)) >> 16);
#endif
}

INLINE vec NAME(from_bfloat16)(hvec x) { return (vec)(NAME(widen)(x) << 16); }

/* As an element of this dtype holds it. */
INLINE vec NAME(rounded)(vec x, Dtype dtype)
{
    return dtype == BFLOAT16 ? NAME(from_bfloat16)(NAME(to_bfloat16)(x)) : x;
}

/* A row's elements from `i` on, `left` of which are there; lanes beyond them are 0. */
INLINE vec NAME(load)(const void *row, int64_t i, int64_t left, Dtype dtype)
{
    const char *from = at(row, i, dtype);
    if (dtype == FLOAT32) {
        if (left >= LANES) {
            vec x;
            memcpy(&x, from, sizeof x);
            return x;
        }
        vec part = {0};
        memcpy(&part, from, left * 4);
        return part;
    }
    if (left >= LANES) {
        hvec bits;
        memcpy(&bits, from, sizeof bits);
        return NAME(from_bfloat16)(bits);
    }
    hvec part = {0};
    memcpy(&part, from, left * 2);
    return NAME(from_bfloat16)(part);
}

/* Writes at most `left` elements from `i` on. */
INLINE void NAME(store)(void *row, int64_t i, int64_t left, Dtype dtype, vec x)
{
    char *to = at_mutable(row, i, dtype);
    if (dtype == FLOAT32) {
        if (left >= LANES) {
            memcpy(to, &x, sizeof x);
        } else {
            vec part = x;
            memcpy(to, &part, left * 4);
        }
        return;
    }
    hvec bits = NAME(to_bfloat16)(x);
    if (left >= LANES) {
        memcpy(to, &bits, sizeof bits);
    } else {
        hvec part = bits;
        memcpy(to, &part, left * 2);
    }
}

INLINE float NAME(load_scalar)(const void *row, int64_t i, Dtype dtype) { return NAME(load)(row, i, 1, dtype)[0]; }

/* e to the power of x, for x <= 0; NaN for NaN. Within 2 units in the last place down to -87, where it ends.
 *
 * Cody and Waite's split of ln 2, and the polynomial of expf in Cephes (Moshier).
 */
INLINE vec NAME(power_of_e)(vec x)
{
    vec lowest = NAME(all)(-87.0f);
    x = NAME(select)(x < lowest, lowest, x);
    /* The nearest whole number: adding 1.5 · 2^23 leaves no bits for fractions. */
    vec whole = x * 1.44269504088896341f + 12582912.0f;
    whole = whole - 12582912.0f;
    vec rest = x - whole * 0.693359375f - whole * -2.12194440e-4f;
    vec series = NAME(all)(1.9875691500e-4f);
    series = NAME(multiply_add)(series, rest, NAME(all)(1.3981999507e-3f));
    series = NAME(multiply_add)(series, rest, NAME(all)(8.3334519073e-3f));
    series = NAME(multiply_add)(series, rest, NAME(all)(4.1665795894e-2f));
    series = NAME(multiply_add)(series, rest, NAME(all)(1.6666665459e-1f));
    series = NAME(multiply_add)(series, rest, NAME(all)(5.0000001201e-1f));
    vec power = series * rest * rest + rest + 1.0f;
    ivec exponent = __builtin_convertvector(whole, ivec);
    return power * (vec)((exponent + 127) << 23);
}

/* 1 / (1 + e^-x), without the power of a positive number, which might be infinite. */
INLINE vec NAME(sigmoid)(vec x)
{
    vec power = NAME(power_of_e)((vec)((uvec)x | 0x80000000u));
    vec one = NAME(all)(1.0f);
    return NAME(select)(x >= (vec){0}, one, power) / (one + power);
}
