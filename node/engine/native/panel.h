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
    const char *next; /* memory that is read soon: asked for meanwhile */
    int64_t next_bytes;
} lanes_t;

/* `rows` rows by `halves` halves of a panel; even and odd sums side by side. */
INLINE void side_by_side(const char *panel, int kind, const lanes_t *work, int rows, int halves) {
    V total[MAX_ROWS][2], even[MAX_ROWS][2], odd[MAX_ROWS][2];
    const int64_t size = half_bytes(kind), stride = work->stride;
    const float *x = work->x;
    const char *next = work->next, *next_end = next + work->next_bytes;
    const int64_t lines = (work->next_bytes / 64 + work->steps - 1) / work->steps; /* a step */
    UNROLL for (int row = 0; row < rows; row++)
        UNROLL for (int half = 0; half < halves; half++)
            total[row][half] = work->begun ? v_load(work->out + row * work->out_stride + 16 * half) : v_zero();
    for (int64_t step = 0; step < work->steps; step++, panel += 2 * size, x += STEP) {
        next = ask_for(next, lines, next_end, NEAR(rows));
        UNROLL for (int row = 0; row < rows; row++)
            UNROLL for (int half = 0; half < halves; half++) even[row][half] = odd[row][half] = v_zero();
        UNROLL for (int pair = 0; pair < 16; pair++)
            UNROLL for (int half = 0; half < halves; half++) {
                const V weight_even = load_weights(panel + half * size, pair, 0, kind);
                UNROLL for (int row = 0; row < rows; row++)
                    even[row][half] = v_fma(v_set(x[row * stride + 2 * pair]), weight_even, even[row][half]);
                const V weight_odd = load_weights(panel + half * size, pair, 1, kind);
                UNROLL for (int row = 0; row < rows; row++)
                    odd[row][half] = v_fma(v_set(x[row * stride + 2 * pair + 1]), weight_odd, odd[row][half]);
            }
        UNROLL for (int row = 0; row < rows; row++)
            UNROLL for (int half = 0; half < halves; half++)
                total[row][half] = v_add(total[row][half], v_add(even[row][half], odd[row][half]));
    }
    UNROLL for (int row = 0; row < rows; row++)
        UNROLL for (int half = 0; half < halves; half++) v_store(work->out + row * work->out_stride + 16 * half, total[row][half]);
}

/* `rows` rows by one half; a step's even sums first, then its odd ones, which takes half the registers. */
INLINE void one_by_one(const char *panel, int kind, const lanes_t *work, int rows) {
    V total[MAX_ROWS], even[MAX_ROWS], sum[MAX_ROWS];
    const int64_t size = half_bytes(kind), stride = work->stride;
    const float *x = work->x;
    const char *next = work->next, *next_end = next + work->next_bytes;
    const int64_t lines = (work->next_bytes / 64 + work->steps - 1) / work->steps; /* a step */
    UNROLL for (int row = 0; row < rows; row++) total[row] = work->begun ? v_load(work->out + row * work->out_stride) : v_zero();
    for (int64_t step = 0; step < work->steps; step++, panel += 2 * size, x += STEP) {
        next = ask_for(next, lines, next_end, NEAR(rows));
        UNROLL for (int odd = 0; odd < 2; odd++) {
            UNROLL for (int row = 0; row < rows; row++) sum[row] = v_zero();
            _Pragma("GCC unroll 4") for (int pair = 0; pair < 16; pair++) {
                const V weight = load_weights(panel, pair, odd, kind);
                UNROLL for (int row = 0; row < rows; row++)
                    sum[row] = v_fma(v_set(x[row * stride + 2 * pair + odd]), weight, sum[row]);
            }
            UNROLL for (int row = 0; row < rows; row++) {
                if (odd)
                    total[row] = v_add(total[row], v_add(even[row], sum[row]));
                else
                    even[row] = sum[row];
            }
        }
    }
    UNROLL for (int row = 0; row < rows; row++) v_store(work->out + row * work->out_stride, total[row]);
}

/* What is quickest differs: measured with GCC 12 on Zen 4, capped to AVX2 and not (bench.engine --only products). */
#if defined(__AVX512F__)
#define HALVES(rows) ((rows) <= 2 ? 2 : 1)
#define FEW(rows, halves) side_by_side(panel, kind, work, rows, halves)
#else
#define HALVES(rows) ((rows) <= 2 ? 2 : 1)
#define FEW(rows, halves) ((rows) <= 2 ? side_by_side(panel, kind, work, rows, halves) : one_by_one(panel, kind, work, rows))
#endif

INLINE void few_rows(const char *panel, int kind, const lanes_t *work, int rows) {
    switch (rows) {
    case 1: FEW(1, HALVES(1)); break;
    case 2: FEW(2, HALVES(2)); break;
    case 3: FEW(3, HALVES(3)); break;
    case 4: FEW(4, HALVES(4)); break;
    case 5: FEW(5, HALVES(5)); break;
    default: FEW(6, HALVES(6));
    }
}

/* Rows in blocks of nearly equal size, all of them by a chunk of steps before the next one, which is asked for meanwhile. */
INLINE void panel_of_kind(const char *panel, int kind, const lanes_t *work, int rows) {
    const int blocks = (rows + MAX_ROWS - 1) / MAX_ROWS, halves = HALVES((rows + blocks - 1) / blocks), passes = blocks * 2 / halves;
    const int64_t step_bytes = 2 * half_bytes(kind), chunk = NEAR(rows) ? (NEAR_BYTES + step_bytes - 1) / step_bytes : CHUNK;
    for (int64_t first = 0; first < work->steps; first += chunk) {
        const int64_t end = least(first + chunk, work->steps);
        lanes_t few = *work;
        few.steps = end - first;
        few.begun = work->begun || first;
        if (end < work->steps) {
            few.next = panel + end * step_bytes;
            few.next_bytes = least(chunk, work->steps - end) * step_bytes;
        }
        if (NEAR(rows)) few.next_bytes = least(few.next_bytes, chunk * step_bytes);
        few.next_bytes = (few.next_bytes / passes + 63) & ~(int64_t)63;
        for (int half = 0; half < 2; half += halves)
            for (int block = 0, row = 0; block < blocks; block++) {
                const int count = (rows - row + blocks - block - 1) / (blocks - block);
                few.x = work->x + row * work->stride + first * STEP;
                few.out = work->out + row * work->out_stride + 16 * half;
                few_rows(panel + first * step_bytes + half * half_bytes(kind), kind, &few, count);
                few.next += few.next_bytes;
                row += count;
            }
    }
}

/* Rows times a panel, into `work->out`. */
static void lanes_panel(const char *panel, int kind, const lanes_t *work, int rows) {
    switch (kind) {
    case BF16: panel_of_kind(panel, BF16, work, rows); break;
    case FP16: panel_of_kind(panel, FP16, work, rows); break;
    default: panel_of_kind(panel, FP32, work, rows);
    }
}
