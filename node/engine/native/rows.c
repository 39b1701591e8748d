/* Products, and the parts of a Llama-shaped layer around its attention, for any number of rows. Compiled once for AVX-512
 * and once for AVX2. Every number comes from its own row by one fixed order of operations, so it does not depend on the
 * rows beside it, on threads, or on which of AVX2, AVX-512 and AMX computed it. */
#include "lanes.h"
#include "mesh.h"

#include <pmmintrin.h>
#include <stdlib.h>

#if defined(__AVX512F__)
#define ROWS rows_avx512
#else
#define ROWS rows_avx2
#endif

#define FEW_ROWS 16 /* up to here turning int8 and int4 into tiles costs more than it spares */
#define TOP_ROWS 36 /* that lanes work off before the next ones: six blocks of six */
#define UNROLL16 _Pragma("GCC unroll 16")

static inline int64_t round_up(int64_t number, int64_t unit) { return (number + unit - 1) / unit * unit; }
static inline int64_t steps_of(const product_t *p) { return (p->k + STEP - 1) / STEP; }
static inline int64_t panels_of(const product_t *p) { return (p->n + PANEL - 1) / PANEL; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- memory that lives as long as a call, a piece a thread */

typedef struct {
    char *memory;
    size_t size, used;
} arena_t;

static __thread arena_t arena, panel_arena;

static void *reserve(arena_t *held, size_t size) { /* the whole piece; what was in it is lost */
    if (held->size < size) {
        free(held->memory);
        held->size = (size + 4095) & ~(size_t)4095;
        held->memory = aligned_alloc(64, held->size);
        if (!held->memory) abort();
    }
    held->used = 0;
    return held->memory;
}

static void *carve(arena_t *held, size_t size) {
    void *at = held->memory + held->used;
    held->used += (size + 63) & ~(size_t)63;
    return at;
}

/* ---- numbers in and out */

static inline unsigned flush_denormals(void) {
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
    return before;
}

static inline V load(const void *from, int64_t at, int bf16) {
    return bf16 ? v_load_bf16((const uint16_t *)from + at) : v_load((const float *)from + at);
}

static inline V load_some(const void *from, int64_t at, int64_t count, int bf16) { /* zeros behind `count` */
    if (count >= 16) return load(from, at, bf16);
    char piece[64] = {0};
    const size_t size = bf16 ? 2 : 4;
    memcpy(piece, (const char *)from + (size_t)at * size, (size_t)count * size);
    return load(piece, 0, bf16);
}

static inline void store_some(void *to, int64_t at, int64_t count, int bf16, V value) {
    char piece[64];
    const size_t size = bf16 ? 2 : 4;
    char *target = count >= 16 ? (char *)to + (size_t)at * size : piece;
    if (bf16)
        v_store_bf16((uint16_t *)target, value);
    else
        v_store((float *)target, value);
    if (count < 16) memcpy((char *)to + (size_t)at * size, piece, (size_t)count * size);
}

/* ---- a panel of a product */

#include "panel.h"

/* A panel's whole numbers as bf16, which holds them exactly, in the order of BF16. */
static const uint16_t *as_tiles(const char *panel, int kind, int64_t steps) {
    if (kind == BF16) return (const uint16_t *)panel;
    uint16_t *tiles = reserve(&panel_arena, (size_t)steps * 2048);
    const int64_t size = half_bytes(kind);
    for (int64_t half = 0; half < 2 * steps; half++)
        for (int pair = 0; pair < 16; pair++) {
            float even[16], odd[16];
            for (int output = 0; output < 16; output++) {
                even[output] = whole_number(panel + half * size, kind, output, 2 * pair);
                odd[output] = whole_number(panel + half * size, kind, output, 2 * pair + 1);
            }
            v_store_pairs(tiles + half * 512 + pair * 32, v_load(even), v_load(odd));
        }
    return tiles;
}

/* ---- a product of a block of rows */

#include "ready.h"

enum into { STORED, ADDED, GATED };

typedef struct {
    const product_t *product;
    input_t input;
    enum into into;
    const void *add; /* ADDED: [rows][stride] */
    void *out;       /* [rows][stride] */
    int64_t stride;
    int add_bf16, out_bf16;
    int64_t claim; /* panels an item */
} work_t;

static void finish(const work_t *w, int64_t panel, int64_t top, int rows, const float *tile) {
    const product_t *p = w->product;
    V scale[2], bias[2];
    for (int half = 0; half < 2; half++) {
        scale[half] = p->kind == INT8 ? v_load(p->scale + panel * PANEL + 16 * half) : v_set(1.0f);
        bias[half] = p->bias ? v_load(p->bias + panel * PANEL + 16 * half) : v_zero();
    }
    for (int row = 0; row < rows; row++) {
        const int64_t at = (top + row) * w->stride;
        V value[2];
        for (int half = 0; half < 2; half++) {
            value[half] = v_load(tile + row * PANEL + 16 * half);
            if (p->kind == INT8) value[half] = v_mul(value[half], scale[half]);
            value[half] = v_add(value[half], bias[half]);
        }
        if (w->into == GATED) {
            store_some(w->out, at + panel * 16, 16, w->out_bf16, v_mul(v_silu(value[0]), value[1]));
            continue;
        }
        for (int half = 0; half < 2; half++) {
            const int64_t column = panel * PANEL + 16 * half, count = least(16, p->n - column);
            if (count <= 0) break;
            if (w->into == ADDED) value[half] = v_add(value[half], load_some(w->add, at + column, count, w->add_bf16));
            store_some(w->out, at + column, count, w->out_bf16, value[half]);
        }
    }
}

static void work_panels(const void *work, int64_t item) {
    const work_t *w = work;
    const product_t *p = w->product;
    const unsigned before = flush_denormals();
    const int64_t steps = steps_of(p), end = least((item + 1) * w->claim, panels_of(p));
    const int64_t panel_bytes = steps * 2 * half_bytes((int)p->kind);
    float tile[TOP_ROWS * PANEL] __attribute__((aligned(64)));
    for (int64_t panel = item * w->claim; panel < end; panel++) {
        const char *weights = (const char *)p->packed + panel * panel_bytes;
        const float *scales = p->kind == INT4 ? p->scale + panel * steps * PANEL : NULL;
        const input_t *in = &w->input;
        const int64_t tops = in->bf16 ? 32 : TOP_ROWS;
        const uint16_t *tiles = in->bf16 ? as_tiles(weights, (int)p->kind, steps) : NULL;
        for (int64_t top = 0; top < in->rows; top += tops) {
            const int rows = (int)least(tops, in->rows - top);
            if (tiles && in_whole_numbers(p))
                amx_panel_scaled(tiles, scales, in->bf16 + top * steps * STEP, in->dots.scales + top * steps, steps, rows, tile);
            else if (tiles)
                amx_panel(tiles, in->bf16 + top * steps * STEP, steps, rows, top == 0, tile);
            else if (in_whole_numbers(p))
                dots->panel(weights, scales, (int)p->kind, &in->dots, top, rows, tile);
            else {
                const lanes_t lanes = {.x = in->fp32 + top * in->stride, .stride = in->stride, .steps = steps, .out = tile, .out_stride = PANEL};
                lanes_panel(weights, panel_bytes, (int)p->kind, lanes, rows);
            }
            finish(w, panel, top, rows, tile);
        }
    }
    _mm_setcsr(before);
}

static void multiply(work_t work, int threads) {
    const int64_t panels = panels_of(work.product), share = panels / (threads * 4);
    const int64_t large = 1 + (64 << 10) / (steps_of(work.product) * 2 * half_bytes((int)work.product->kind));
    work.claim = threads == 1 ? panels : share < 1 ? 1 : least(share, large);
    pool_run(work_panels, &work, (panels + work.claim - 1) / work.claim, threads);
}

static inline const void *row_at(const void *rows, int64_t row, int64_t width, int bf16) {
    return (const char *)rows + row * width * (bf16 ? 2 : 4);
}

static void product(
    const product_t *p, const void *x, int64_t rows, int bf16, const void *add, void *out, int out_bf16, int threads) {
    for (int64_t top = 0; top < rows; top += ROW_BLOCK) {
        const int64_t count = least(ROW_BLOCK, rows - top);
        reserve(&arena, input_bytes(p, count));
        const input_t input = make_ready(p, row_at(x, top, p->k, bf16), count, bf16, NULL, 0, threads);
        const work_t work = {p, input, add ? ADDED : STORED, add ? row_at(add, top, p->n, out_bf16) : NULL,
                             (void *)row_at(out, top, p->n, out_bf16), p->n, out_bf16, out_bf16, 0};
        multiply(work, threads);
    }
}

static void logits(const product_t *p, const float *norm, float eps, const void *x, int64_t rows, int bf16, float *out, int threads) {
    for (int64_t top = 0; top < rows; top += ROW_BLOCK) {
        const int64_t count = least(ROW_BLOCK, rows - top);
        reserve(&arena, input_bytes(p, count));
        const input_t input = make_ready(p, row_at(x, top, p->k, bf16), count, bf16, norm, eps, threads);
        const work_t work = {p, input, STORED, NULL, out + top * p->n, p->n, 0, 0, 0};
        multiply(work, threads);
    }
}

/* ---- the parts of a layer */

typedef struct {
    const layer_t *layer;
    const int64_t *positions;
    const float *turns; /* [positions][2][dim / 2]: cosines, then sines */
    const float *from;  /* [rows][(heads + 2 * kv_heads) * dim] */
    void *to;           /* the same, in the rows' own type */
    int bf16;
} turn_t;

static void turn_row(const void *work, int64_t row) {
    const turn_t *t = work;
    const layer_t *l = t->layer;
    const unsigned before = flush_denormals();
    const int64_t dim = l->dim, middle = dim / 2, turning = l->heads + l->kv_heads, all = turning + l->kv_heads;
    const float *cosines = t->turns + t->positions[row] * dim, *sines = cosines + middle;
    for (int64_t head = 0; head < all; head++) {
        const int64_t at = (row * all + head) * dim;
        const float *norm = head < l->heads ? l->query_norm : l->key_norm;
        if (head >= turning) {
            for (int64_t i = 0; i < dim; i += 16) store_some(t->to, at + i, dim - i, t->bf16, load_some(t->from, at + i, dim - i, 0));
            continue;
        }
        const V factor = v_set(norm ? norm_factor(t->from, at, dim, 0, l->head_eps) : 1.0f);
        for (int64_t i = 0; i < middle; i += 16) {
            const int64_t count = middle - i;
            V x = load_some(t->from, at + i, count, 0), y = load_some(t->from, at + middle + i, count, 0);
            if (norm) {
                x = v_mul(v_mul(x, factor), load_some(norm, i, count, 0));
                y = v_mul(v_mul(y, factor), load_some(norm, middle + i, count, 0));
            }
            const V c = load_some(cosines, i, count, 0), s = load_some(sines, i, count, 0);
            store_some(t->to, at + i, count, t->bf16, v_fma(x, c, v_sub(v_zero(), v_mul(y, s))));
            store_some(t->to, at + middle + i, count, t->bf16, v_fma(y, c, v_mul(x, s)));
        }
    }
    _mm_setcsr(before);
}

static void before_attention(const layer_t *l, const void *x, const int64_t *positions, const float *turns, int64_t rows, int bf16,
                             void *qkv, int threads) {
    const int64_t width = l->qkv.n;
    for (int64_t top = 0; top < rows; top += ROW_BLOCK) {
        const int64_t count = least(ROW_BLOCK, rows - top);
        reserve(&arena, input_bytes(&l->qkv, count) + (size_t)(count * width * 4 + 64));
        float *flat = carve(&arena, (size_t)(count * width * 4));
        const void *from = row_at(x, top, l->hidden, bf16);
        const input_t input = make_ready(&l->qkv, from, count, bf16, l->before_attention, l->eps, threads);
        multiply((work_t){&l->qkv, input, STORED, NULL, flat, width, 0, 0, 0}, threads);
        const turn_t turn = {l, positions + top, turns, flat, (void *)row_at(qkv, top, width, bf16), bf16};
        pool_run(turn_row, &turn, count, count >= 16 ? threads : 1);
    }
}

static void after_attention(const layer_t *l, const void *answer, void *x, int64_t rows, int bf16, int threads) {
    const int64_t wide = steps_of(&l->down) * STEP, size = bf16 ? 2 : 4;
    for (int64_t top = 0; top < rows; top += ROW_BLOCK) {
        const int64_t count = least(ROW_BLOCK, rows - top);
        reserve(&arena, input_bytes(&l->out, count) + input_bytes(&l->gate_up, count) + input_bytes(&l->down, count) +
                            (size_t)(count * wide * size + 64));
        void *here = (void *)row_at(x, top, l->hidden, bf16);
        input_t input = make_ready(&l->out, row_at(answer, top, l->out.k, bf16), count, bf16, NULL, 0, threads);
        multiply((work_t){&l->out, input, ADDED, here, here, l->hidden, bf16, bf16, 0}, threads);
        input = make_ready(&l->gate_up, here, count, bf16, l->before_mlp, l->eps, threads);
        char *gated = carve(&arena, (size_t)(count * wide * size));
        const int64_t written = panels_of(&l->gate_up) * 16;
        for (int64_t row = 0; row < count && written < wide; row++)
            memset(gated + (row * wide + written) * size, 0, (size_t)((wide - written) * size));
        multiply((work_t){&l->gate_up, input, GATED, NULL, gated, wide, bf16, bf16, 0}, threads);
        product_t down = l->down;
        down.k = wide; /* the gated rows are padded already */
        input = make_ready(&down, gated, count, bf16, NULL, 0, threads);
        multiply((work_t){&down, input, ADDED, here, here, l->hidden, bf16, bf16, 0}, threads);
    }
}

#include "attend.h"

const rows_t ROWS = {product, layers, logits};
