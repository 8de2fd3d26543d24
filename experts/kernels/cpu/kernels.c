/* The arithmetic of inference on a CPU: packed products, and everything between them.
 *
 * The files that `variant.h` includes are compiled once for each variant of the instruction set. `vectors.h` has what
 * differs between variants; the others are written in its terms. `library.py` loads the shared library, asks for
 * `best_variant`, and takes the functions by their names, such as `avx2_swiglu`.
 *
 * Shapes are in the names as in the Python code: x_TD has T rows (tokens) of D elements. A function reads and writes
 * contiguous rows of float32 or bfloat16, computes in float32, and rounds to bfloat16 where the operators of PyTorch
 * do. Each row is computed in the same order of operations whatever the other rows are. Nothing here starts a thread.
 *
 * Compile with -ffp-contract=off: a product and a sum are fused only where `multiply_add` says so, so that all compilers
 * round alike.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

/* Changes with every change of a function's arguments or of a structure: `library.py` refuses another number. */
#define INTERFACE_VERSION 1

#define EXPORT __attribute__((visibility("default")))

typedef enum { FLOAT32 = 0, BFLOAT16 = 1 } Dtype;

/* What a function returns. */
enum { OK = 0, NO_SUCH_EXPERT = 1, OUT_OF_MEMORY = 2 };

/* The weights of a linear layer, in the order in which a product with few rows reads them: see `product.h`. */
typedef struct {
    const char *weights;
    const float *bias;
    int64_t steps;
    int64_t outputs;
} PackedMatrix;

/* One layer's attention, with the norm before it and the norm after it, and the layer's part of the cache. */
typedef struct {
    int64_t dtype;
    int64_t hidden_size;
    int64_t query_heads;
    int64_t kv_heads;
    int64_t head_dim;
    int64_t block_size; /* slots of a block of the cache */
    char *keys_SHD;     /* slots × key-value heads × head_dim */
    char *values_SHD;
    const char *norm_before_D;
    const char *norm_after_D;
    const PackedMatrix *qkv; /* NULL where another library computes the products */
    const PackedMatrix *output;
    float scaling;
    float epsilon_before;
    float epsilon_after;
} AttentionLayer;

/* The tokens of one step. Those that attend by themselves are each the last token of one of B sequences. */
typedef struct {
    int64_t tokens;
    const char *cos_TD;
    const char *sin_TD;
    const int64_t *slots_T; /* each token's place in the cache */
    int64_t sequences;
    int64_t blocks;                 /* columns of the block tables */
    const int64_t *rows_B;          /* the tokens that attend by themselves */
    const int64_t *block_tables_BN; /* the blocks of each sequence */
    const int64_t *lengths_B;       /* tokens of each sequence, the new one included */
} StepTokens;

/* Dense MLP and shared expert of one layer. */
typedef struct {
    int64_t dtype;
    int64_t hidden_size;
    int64_t dense_size;         /* inner size of the dense MLP */
    int64_t shared_size;        /* inner size of the shared expert */
    const PackedMatrix *inputs; /* gate and up of the dense MLP, gate and up of the shared expert, three factors */
    const PackedMatrix *dense_down;
    const PackedMatrix *shared_down;
} DenseLayer;

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

static inline int64_t element_size(Dtype dtype) { return dtype == BFLOAT16 ? 2 : 4; }

/* The address of element `i`. */
static inline const char *at(const void *x, int64_t i, Dtype dtype) { return (const char *)x + i * element_size(dtype); }

static inline char *at_mutable(void *x, int64_t i, Dtype dtype) { return (char *)x + i * element_size(dtype); }

#define JOINED(a, b) a##_##b
#define JOINED_VALUES(a, b) JOINED(a, b)
/* The name of a function in the variant that is being compiled. */
#define NAME(function) JOINED_VALUES(VARIANT, function)
/* Inlined with `dtype` as a constant, so that one text gives the code for both dtypes. */
#define INLINE static inline __attribute__((always_inline)) TARGET
#define FUNCTION EXPORT TARGET
#define PART static TARGET

/* Any processor; with 4 lanes the compiler uses SSE2 on x86-64 and NEON on ARM. */
#define VARIANT plain
#define TARGET
#define LANES 4
#define TILE_ROWS 1
#include "variant.h"

#if defined(__x86_64__)

#define VARIANT avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define TILE_ROWS 3
#include "variant.h"

#define VARIANT avx512
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#define LANES 16
#define TILE_ROWS 11
#include "variant.h"

/* As avx512, with instructions that multiply pairs of bfloat16 and that round to bfloat16. */
#define VARIANT avx512_bf16
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define LANES 16
#define TILE_ROWS 11
#define BFLOAT16_INSTRUCTIONS
#include "variant.h"

#endif

EXPORT int64_t interface_version(void) { return INTERFACE_VERSION; }

/* Whether this processor runs a variant. */
EXPORT int64_t variant_supported(const char *name)
{
    if (strcmp(name, "plain") == 0)
        return 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (strcmp(name, "avx2") == 0)
        return avx2;
    if (strcmp(name, "avx512") == 0)
        return avx512;
    if (strcmp(name, "avx512_bf16") == 0)
        return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    return 0;
}

/* Whether this processor multiplies whole matrices of bfloat16 (AMX), which oneDNN uses and nothing here does. */
EXPORT int64_t has_matrix_instructions(void)
{
#if defined(__x86_64__)
    unsigned eax, ebx, ecx, edx;
    /* Intel SDM, CPUID leaf 7: AMX-BF16 is bit 22 of EDX. */
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1);
#else
    return 0;
#endif
}
