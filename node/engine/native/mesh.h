/* What the parts of the kernel share. library.py has the structures that Python passes: product_t, layer_t, spans_t. */
#ifndef MESH_H
#define MESH_H

#include <stdint.h>

#define PANEL 32      /* outputs that are computed together */
#define STEP 32       /* inputs that are summed together before they join the total: one AMX tile */
#define ROW_BLOCK 256 /* rows that share one reading of the weights */
#define CHUNK 8        /* steps of a panel that all rows are multiplied by before the next are read: 16 KiB of BF16 */

enum kind { BF16, FP32, FP16, INT8, INT4 };

/* A weight [n, k] in the order of reading: panels of 32 outputs, in each steps of 32 inputs, in each two halves of 16
 * outputs. A half is, by its 16 pairs of inputs, BF16: [pair][output][2]; FP16, FP32: [pair][2][output]; by its 8 quads of
 * inputs, INT8: [quad][output][4], each number plus 128; INT4: [quad / 2][output][4], each number plus 8, of an even quad in
 * the low four bits, of the next one in the high ones. Everything beyond n and k is zero. */
typedef struct {
    const void *packed;
    const float *bias;  /* [panels * 32] or null */
    const float *scale; /* INT8: [panels * 32]; INT4: [panels][steps][32]; else null */
    int64_t n, k;
    int64_t kind;
} product_t;

typedef struct {
    const float *before_attention; /* norm weights [hidden], float32 */
    const float *query_norm, *key_norm; /* [dim] or null */
    const float *before_mlp;
    product_t qkv, out, gate_up, down; /* gate_up: each panel holds 16 gates, then their 16 ups */
    float eps, head_eps, scale;
    int64_t hidden, heads, kv_heads, dim, middle, window; /* window: 0, or how many keys a query may see */
} layer_t;

/* The sequences of a step. Keys and values lie [kv_heads][stride / dim][dim], as the rows' own type. */
typedef struct {
    int64_t spans;
    const int64_t *row, *count, *position; /* rows [row, row + count) stand at positions position, position + 1, … */
    const int64_t *stride;                 /* elements from one head to the next */
    const int64_t *keys, *values;          /* addresses [layers][spans] */
} spans_t;

/* How panels are worked off: all give the same bits. */
enum isa { NONE, AVX2, AVX512, AMX };

typedef void (*item_fn)(const void *work, int64_t item);
void pool_run(item_fn run, const void *work, int64_t items, int threads);

typedef struct {
    void (*product)(const product_t *, const void *x, int64_t rows, int bf16, const void *add, void *out, int out_bf16, int threads);
    void (*layers)(const layer_t *const *, int64_t count, void *x, const int64_t *positions, const float *turns, int64_t rows,
                   int bf16, const spans_t *, int threads);
    void (*logits)(const product_t *, const float *norm, float eps, const void *x, int64_t rows, int bf16, float *out, int threads);
} rows_t;

extern const rows_t rows_avx2, rows_avx512;
extern int use_amx;

/* Rows of whole numbers from -127 to 127, with what makes sums of them products again. */
typedef struct {
    int8_t *numbers;  /* [rows][steps * 32] */
    int16_t *words;   /* the same, where they are taken so */
    float *scales;    /* [rows][steps] */
    int32_t *offsets; /* [rows][steps]: what the offset of the weights adds to a step's sums, to be taken away again */
    int64_t steps;
} dot_rows_t;

typedef struct {
    /* `rows` rows from `top` on times a panel of INT8 or INT4, scales [steps][32] or null, into out [rows][32]. */
    void (*panel)(const void *packed, const float *scales, int kind, const dot_rows_t *x, int64_t top, int rows, float *out);
    int takes_words; /* of INT8 */
} dots_t;

extern const dots_t dots_avx2, dots_avx_vnni, dots_avx512_vnni;
extern const dots_t *dots;

static inline int64_t half_bytes(int kind) { /* of 16 outputs by 32 inputs */
    return kind == FP32 ? 2048 : kind == INT8 ? 512 : kind == INT4 ? 256 : 1024;
}

static inline int whole_number(const char *half, int kind, int output, int input) { /* a weight of INT8 or INT4 */
    const uint8_t *at = (const uint8_t *)half + output * 4 + input % 4;
    if (kind == INT8) return at[input / 4 * 64] - 128;
    const int pair = at[input / 8 * 64];
    return (input / 4 % 2 ? pair >> 4 : pair & 15) - 8;
}

#define MAY_LACK __attribute__((weak)) /* where the compiler does not know AMX; `use_amx` is then 0 */

/* rows <= 32 of x [rows, steps * 32] bf16 times one BF16 panel, into out [rows][32]. `first`: of the panel's rows, so that
 * the panel comes from memory and is asked for ahead. */
MAY_LACK void amx_panel(const uint16_t *panel, const uint16_t *x, int64_t steps, int rows, int first, float *out);

/* The same, each step's sums multiplied by row_scales [rows][steps] and, if given, scales [steps][32] before they join the total. */
MAY_LACK void amx_panel_scaled(const uint16_t *panel, const float *scales, const uint16_t *x, const float *row_scales, int64_t steps, int rows,
                      float *out);

/* `count` panels one behind the other, of x [rows][x_stride], each into 32 columns of out [rows][stride]; added to what is there
 * if `begun`. */
MAY_LACK void amx_panels(const uint16_t *panels, int64_t count, const uint16_t *x, int64_t x_stride, int64_t steps, int rows, int begun,
                float *out, int64_t stride);

#endif
