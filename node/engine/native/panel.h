/* A panel of a product with float weights, part of rows.c. Of a step's 32 products the even and the odd ones are summed
 * apart, in order, by fused multiply-adds; both sums are added, then joined to the total: what an AMX tile computes. */

#include "ahead.h"

#define MAX_ROWS 6 /* that meet a weight in registers */

/* The weights of input 2 * pair, or of 2 * pair + 1, for 16 outputs. */
INLINE V load_weights(const char *half, int pair, int odd, int kind) {
    switch (kind) {
    case BF16: return odd ? v_load_odd((const uint16_t *)half + pair * 32) : v_load_even((const uint16_t *)half + pair * 32);
    case FP16: return v_load_fp16((const uint16_t *)half + pair * 32 + 16 * odd);
    default: return v_load((const float *)half + pair * 32 + 16 * odd);
    }
}

typedef struct {
    const float *x; /* [rows][stride] */
    int64_t stride, steps;
    float *out; /* [rows][out_stride]: what has been summed before, if `begun` */
    int64_t out_stride;
    int begun;
    const char *next; /* memory that is read soon, if any: asked for meanwhile */
    int64_t next_bytes;
} lanes_t;

/* What is quickest differs: measured with GCC 12 on Zen 4, capped to AVX2 and not (bench.engine --only products). */
#if defined(__AVX512F__)
#define IN_ORDER 3 /* rows: so many and fewer read a panel in the order in which it lies */
#define BLOCK_STEP side_by_side
#else
#define IN_ORDER 6
#define BLOCK_STEP in_turn
#endif
#define AHEAD_BYTES 2048 /* by which five and six rows, slower than memory, ask for weights themselves */

/* Keeps an array in memory while products are summed: GCC 12 would give it registers that the sums need. */
#define SETTLE(array) __asm__ volatile("" : : "r"(array) : "memory")

/* Asks for the memory that lies `ahead` bytes behind a pair's weights; 0: for none. */
INLINE void ask_ahead(const char *half, int kind, int pair, int64_t ahead) {
    const int size = half_bytes(kind) / 16;
    if (ahead)
        for (int line = 0; line < size; line += 64) _mm_prefetch(half + size * pair + line + ahead, _MM_HINT_T0);
}

/* A step's sums of one half of a panel, added to the totals: even and odd ones side by side. */
INLINE void side_by_side(const char *half, int kind, const float *x, int64_t stride, int rows, int64_t ahead, V *total) {
    V even[MAX_ROWS], odd[MAX_ROWS];
    UNROLL for (int row = 0; row < rows; row++) even[row] = odd[row] = v_zero();
    UNROLL for (int pair = 0; pair < 16; pair++) {
        ask_ahead(half, kind, pair, ahead);
        const V weight_even = load_weights(half, pair, 0, kind);
        UNROLL for (int row = 0; row < rows; row++) even[row] = v_fma(v_set(x[row * stride + 2 * pair]), weight_even, even[row]);
        const V weight_odd = load_weights(half, pair, 1, kind);
        UNROLL for (int row = 0; row < rows; row++) odd[row] = v_fma(v_set(x[row * stride + 2 * pair + 1]), weight_odd, odd[row]);
    }
    UNROLL for (int row = 0; row < rows; row++) total[row] = v_add(total[row], v_add(even[row], odd[row]));
}

/* The odd sums after the even ones, which takes half the registers. */
INLINE void in_turn(const char *half, int kind, const float *x, int64_t stride, int rows, int64_t ahead, V *total) {
    V even[MAX_ROWS], sum[MAX_ROWS];
    UNROLL for (int odd = 0; odd < 2; odd++) {
        UNROLL for (int row = 0; row < rows; row++) sum[row] = v_zero();
        _Pragma("GCC unroll 4") for (int pair = 0; pair < 16; pair++) {
            if (!odd) ask_ahead(half, kind, pair, ahead);
            const V weight = load_weights(half, pair, odd, kind);
            UNROLL for (int row = 0; row < rows; row++) sum[row] = v_fma(v_set(x[row * stride + 2 * pair + odd]), weight, sum[row]);
        }
        UNROLL for (int row = 0; row < rows; row++) {
            if (odd)
                total[row] = v_add(total[row], v_add(even[row], sum[row]));
            else
                even[row] = sum[row];
        }
        SETTLE(even);
    }
    SETTLE(total);
}

/* Few rows by a panel, in the order in which it lies: the processor asks for what follows by itself. What else is read soon
 * is asked for at the same pace. */
INLINE void few_rows(const char *panel, int kind, const lanes_t *work, int rows, int asks) {
    V total[2][MAX_ROWS];
    UNROLL for (int half = 0; half < 2; half++)
        UNROLL for (int row = 0; row < rows; row++)
            total[half][row] = work->begun ? v_load(work->out + row * work->out_stride + 16 * half) : v_zero();
    const float *x = work->x;
    const int64_t next = work->next - panel, ahead = asks && next ? next : 64;
    for (int64_t step = 0; step < work->steps; step++, x += STEP)
        UNROLL for (int half = 0; half < 2; half++, panel += half_bytes(kind)) {
            if (rows <= 2) {
                side_by_side(panel, kind, x, work->stride, rows, asks ? ahead : 0, total[half]);
                SETTLE(total[half]);
            } else {
                in_turn(panel, kind, x, work->stride, rows, asks ? ahead : 0, total[half]);
            }
        }
    UNROLL for (int half = 0; half < 2; half++)
        UNROLL for (int row = 0; row < rows; row++) v_store(work->out + row * work->out_stride + 16 * half, total[half][row]);
}

/* A block of rows by half a panel; meanwhile `next` is asked for. */
INLINE void block_of_rows(const char *panel, int kind, const lanes_t *work, int rows) {
    V total[MAX_ROWS];
    UNROLL for (int row = 0; row < rows; row++) total[row] = work->begun ? v_load(work->out + row * work->out_stride) : v_zero();
    const float *x = work->x;
    const char *next = work->next, *next_end = next + work->next_bytes;
    const int64_t lines = (work->next_bytes / 64 + work->steps - 1) / work->steps; /* a step */
    for (int64_t step = 0; step < work->steps; step++, panel += 2 * half_bytes(kind), x += STEP) {
        next = ask_for(next, lines, next_end);
        BLOCK_STEP(panel, kind, x, work->stride, rows, 0, total);
    }
    UNROLL for (int row = 0; row < rows; row++) v_store(work->out + row * work->out_stride, total[row]);
}

#define FEW(rows, asks) \
    case rows: few_rows(panel, kind, work, rows, asks); break;
#define BLOCK(rows) \
    case rows: block_of_rows(panel, kind, work, rows); break;

INLINE void some_rows(const char *panel, int kind, const lanes_t *work, int rows, int asks) {
    switch (rows) {
        FEW(1, asks)
        FEW(2, asks)
        FEW(3, asks)
#if IN_ORDER > 3
        FEW(4, asks)
        FEW(5, 1)
        FEW(6, 1)
#endif
    }
}

INLINE void some_of_many(const char *panel, int kind, const lanes_t *work, int rows) {
    switch (rows) {
        BLOCK(3)
        BLOCK(4)
        BLOCK(5)
        BLOCK(6)
    }
}

/* Rows in blocks of nearly equal size, all of them by a chunk of steps before the next one, which is asked for meanwhile. */
INLINE void many_rows(const char *panel, int kind, const lanes_t *work, int rows) {
    const int blocks = (rows + MAX_ROWS - 1) / MAX_ROWS, passes = blocks * 2;
    const int64_t step_bytes = 2 * half_bytes(kind);
    for (int64_t first = 0; first < work->steps; first += CHUNK) {
        const int64_t end = least(first + CHUNK, work->steps);
        lanes_t few = *work;
        few.steps = end - first;
        few.begun = work->begun || first;
        if (end < work->steps) {
            few.next = panel + end * step_bytes;
            few.next_bytes = least(CHUNK, work->steps - end) * step_bytes;
        }
        few.next_bytes = (few.next_bytes / passes + 63) & ~(int64_t)63;
        for (int half = 0; half < 2; half++)
            for (int block = 0, row = 0; block < blocks; block++) {
                const int count = (rows - row + blocks - block - 1) / (blocks - block);
                few.x = work->x + row * work->stride + first * STEP;
                few.out = work->out + row * work->out_stride + 16 * half;
                some_of_many(panel + first * step_bytes + half * half_bytes(kind), kind, &few, count);
                few.next += few.next_bytes;
                row += count;
            }
    }
}

INLINE void panel_of_kind(const char *panel, int kind, const lanes_t *work, int rows, int asks) {
    if (rows > IN_ORDER)
        many_rows(panel, kind, work, rows);
    else
        some_rows(panel, kind, work, rows, asks);
}

/* Rows times one of many panels that lie one behind the other, into `work->out`. */
static void lanes_panel(const char *panel, int64_t panel_bytes, int kind, lanes_t work, int rows) {
    work.next = panel + (rows > IN_ORDER ? panel_bytes : AHEAD_BYTES);
    work.next_bytes = least(CHUNK, work.steps) * 2 * half_bytes(kind);
    switch (kind) {
    case BF16: panel_of_kind(panel, BF16, &work, rows, 0); break;
    case FP16: panel_of_kind(panel, FP16, &work, rows, 0); break;
    default: panel_of_kind(panel, FP32, &work, rows, 0);
    }
}

/* Rows times a panel that is in the cache; `work->next` is memory. */
static void lanes_cached_panel(const char *panel, int kind, const lanes_t *work, int rows) {
    if (kind == BF16)
        panel_of_kind(panel, BF16, work, rows, 1);
    else
        panel_of_kind(panel, FP32, work, rows, 1);
}
