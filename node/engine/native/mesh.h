/* What the parts of the kernel share, and what Python calls (node/engine/native.py has the same structures). */
#ifndef MESH_H
#define MESH_H

#include <stdint.h>

#define PANEL 32      /* outputs that are computed together */
#define STEP 32       /* inputs that are summed together before they join the total: one AMX tile */
#define ROW_BLOCK 256 /* rows that share one reading of the weights */

enum kind { BF16, FP32, FP16, INT8, INT4 };

/* A weight [n, k] in the order of reading: panels of 32 outputs, in each steps of 32 inputs, in each two halves of 16
 * outputs, in each 16 pairs of inputs. BF16: [pair][output][2]; INT4: [pair][output] with the pair in one byte; else
 * [pair][2][output]. Everything beyond n and k is zero. */
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

/* How panels are worked off: all three give the same bits. */
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

/* rows <= 32 of x [rows, steps * 32] bf16 times one BF16 panel, into out [rows][32]. With scales [steps][32] each step's
 * sums are multiplied before they join the total. */
void amx_panel(const uint16_t *panel, const uint16_t *x, int64_t steps, int rows, int first, float *out);
void amx_panel_scaled(const uint16_t *panel, const float *scales, const uint16_t *x, int64_t steps, int rows, float *out);

/* `count` panels one behind the other, each into 32 columns of out [rows][stride]. */
void amx_panels(const uint16_t *panels, int64_t count, const uint16_t *x, int64_t steps, int rows, float *out, int64_t stride);

#endif
