/* Panels of whole numbers, compiled once for each way to sum products of bytes: VPDPBUSD of AVX-512 or of AVX-VNNI, else
 * AVX2. A row comes rounded to whole numbers from -127 to 127 with one scale a step; weights are held with an offset that
 * makes them unsigned. Sums of a step are exact in 32 bits, so all ways give the same bits: each step's sum, as a float,
 * is multiplied by its scale and joins the total by one fused multiply-add. */
#if defined(DOTS_256)
#define LANES_256
#endif
#include "ahead.h"
#include "lanes.h"
#include "mesh.h"
/* A step's inputs by quads, two of them a turn: INT4 holds two in one line. */
#define TURNS _Pragma("GCC unroll 1") for (int turn = 0; turn < 4; turn++)
#define QUADS UNROLL for (int odd = 0; odd < 2; odd++)

#if defined(__AVX512VNNI__) && !defined(DOTS_256)
#define DOTS dots_avx512_vnni
#define MAX_ROWS 6
#elif defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define DOTS dots_avx_vnni
#define MAX_ROWS 3
#define DOTS_VNNI
#else
#define DOTS dots_avx2
#define MAX_ROWS 4
#endif

/* The sums of one step join the totals of 16 outputs. */
INLINE V joined(V total, V sum, float row_scale, const float *scales) {
    const V by = scales ? v_mul(v_set(row_scale), v_load(scales)) : v_set(row_scale);
    return v_fma(by, sum, total);
}

#if defined(__AVX512VNNI__) && !defined(DOTS_256)

typedef __m512i SUMS; /* of 16 outputs */

INLINE SUMS sums_begin(int32_t offset) { return _mm512_set1_epi32(offset); }
INLINE V sums_float(SUMS sums) { return _mm512_cvtepi32_ps(sums); }

INLINE void step_sums(const uint8_t *half, int kind, const dot_rows_t *x, int64_t row, int64_t step, int rows, SUMS *sums) {
    const int8_t *numbers = x->numbers + (row * x->steps + step) * STEP;
    const int64_t stride = x->steps * STEP;
    const VI low = _mm512_set1_epi8(15);
    TURNS QUADS {
        VI weights;
        if (kind == INT8) {
            weights = _mm512_loadu_si512(half + turn * 128 + odd * 64);
        } else {
            const VI pair = _mm512_loadu_si512(half + turn * 64);
            weights = _mm512_and_si512(odd ? _mm512_srli_epi16(pair, 4) : pair, low);
        }
        UNROLL for (int i = 0; i < rows; i++) {
            int32_t four;
            memcpy(&four, numbers + i * stride + turn * 8 + odd * 4, 4);
            sums[i] = _mm512_dpbusd_epi32(sums[i], weights, _mm512_set1_epi32(four));
        }
    }
}

#else

typedef struct {
    __m256i a, b;
} SUMS;

INLINE V sums_float(SUMS sums) { return BOTH(_mm256_cvtepi32_ps(sums.a), _mm256_cvtepi32_ps(sums.b)); }
INLINE SUMS sums_begin(int32_t offset) { return (SUMS){_mm256_set1_epi32(offset), _mm256_set1_epi32(offset)}; }

/* The bytes of a quad: eight outputs from `at` on, four inputs each. */
INLINE __m256i quad_weights(const uint8_t *half, int kind, int turn, int odd, int at) {
    if (kind == INT8) return _mm256_loadu_si256((const void *)(half + turn * 128 + odd * 64 + at * 4));
    const __m256i pair = _mm256_loadu_si256((const void *)(half + turn * 64 + at * 4));
    return _mm256_and_si256(odd ? _mm256_srli_epi16(pair, 4) : pair, _mm256_set1_epi8(15));
}

INLINE __m256i four_numbers(const int8_t *from) {
    int32_t four;
    memcpy(&four, from, 4);
    return _mm256_set1_epi32(four);
}

#if defined(DOTS_VNNI)

#if defined(__AVXVNNI__)
#define DPBUSD _mm256_dpbusd_avx_epi32
#else
#define DPBUSD _mm256_dpbusd_epi32
#endif

INLINE void step_sums(const uint8_t *half, int kind, const dot_rows_t *x, int64_t row, int64_t step, int rows, SUMS *sums) {
    const int8_t *numbers = x->numbers + (row * x->steps + step) * STEP;
    const int64_t stride = x->steps * STEP;
    TURNS QUADS {
        const __m256i a = quad_weights(half, kind, turn, odd, 0), b = quad_weights(half, kind, turn, odd, 8);
        UNROLL for (int i = 0; i < rows; i++) {
            const __m256i four = four_numbers(numbers + i * stride + turn * 8 + odd * 4);
            sums[i].a = DPBUSD(sums[i].a, a, four);
            sums[i].b = DPBUSD(sums[i].b, b, four);
        }
    }
}

#else

/* Products of nibbles and bytes: sums of a step fit 16 bits, 32 x 15 x 127 in two halves. */
INLINE void nibble_sums(const uint8_t *half, const dot_rows_t *x, int64_t row, int64_t step, int rows, SUMS *sums) {
    const int8_t *numbers = x->numbers + (row * x->steps + step) * STEP;
    const int64_t stride = x->steps * STEP;
    SUMS words[MAX_ROWS];
    UNROLL for (int i = 0; i < rows; i++) words[i] = sums_begin(0);
    TURNS QUADS {
        const __m256i a = quad_weights(half, INT4, turn, odd, 0), b = quad_weights(half, INT4, turn, odd, 8);
        UNROLL for (int i = 0; i < rows; i++) {
            const __m256i four = four_numbers(numbers + i * stride + turn * 8 + odd * 4);
            words[i].a = _mm256_add_epi16(words[i].a, _mm256_maddubs_epi16(a, four));
            words[i].b = _mm256_add_epi16(words[i].b, _mm256_maddubs_epi16(b, four));
        }
    }
    const __m256i ones = _mm256_set1_epi16(1);
    UNROLL for (int i = 0; i < rows; i++) {
        sums[i].a = _mm256_add_epi32(sums[i].a, _mm256_madd_epi16(words[i].a, ones));
        sums[i].b = _mm256_add_epi32(sums[i].b, _mm256_madd_epi16(words[i].b, ones));
    }
}

/* Sums of eight outputs, from `at` on; products of bytes would not fit 16 bits. */
INLINE void byte_sums(const uint8_t *half, int at, const dot_rows_t *x, int64_t row, int64_t step, int rows, __m256i *sums) {
    const int16_t *numbers = x->words + (row * x->steps + step) * STEP;
    const int64_t stride = x->steps * STEP;
    __m256i low[MAX_ROWS], high[MAX_ROWS]; /* of four outputs, two sums each */
    UNROLL for (int i = 0; i < rows; i++) low[i] = high[i] = _mm256_setzero_si256();
    TURNS QUADS {
        const __m256i a = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)(half + turn * 128 + odd * 64 + at * 4)));
        const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)(half + turn * 128 + odd * 64 + at * 4 + 16)));
        UNROLL for (int i = 0; i < rows; i++) {
            int64_t words;
            memcpy(&words, numbers + i * stride + turn * 8 + odd * 4, 8);
            const __m256i four = _mm256_set1_epi64x(words);
            low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(a, four));
            high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(b, four));
        }
    }
    UNROLL for (int i = 0; i < rows; i++) {
        const __m256i pairs = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low[i], high[i]), 0xd8);
        sums[i] = _mm256_add_epi32(sums[i], pairs);
    }
}

INLINE void step_sums(const uint8_t *half, int kind, const dot_rows_t *x, int64_t row, int64_t step, int rows, SUMS *sums) {
    if (kind == INT4) {
        nibble_sums(half, x, row, step, rows, sums);
        return;
    }
    __m256i side[2][MAX_ROWS];
    UNROLL for (int i = 0; i < rows; i++) {
        side[0][i] = sums[i].a;
        side[1][i] = sums[i].b;
    }
    byte_sums(half, 0, x, row, step, rows, side[0]);
    byte_sums(half, 8, x, row, step, rows, side[1]);
    UNROLL for (int i = 0; i < rows; i++) sums[i] = (SUMS){side[0][i], side[1][i]};
}

#endif
#endif

/* `rows` rows from `row` on times half a panel's steps [first, end), added to out [rows][PANEL]. Meanwhile `lines` lines of
 * memory a step are asked for, from `next` on. */
INLINE void few_rows(const uint8_t *half, const float *scales, int kind, const dot_rows_t *x, int64_t row, int64_t first, int64_t end,
                     int rows, const char *next, int64_t lines, float *out) {
    const int64_t size = 2 * half_bytes(kind);
    const char *const next_end = next + lines * 64 * (end - first);
    V total[MAX_ROWS];
    UNROLL for (int i = 0; i < rows; i++) total[i] = first ? v_load(out + i * PANEL) : v_zero();
    for (int64_t step = first; step < end; step++) {
        next = ask_for(next, lines, next_end);
        SUMS sums[MAX_ROWS];
        UNROLL for (int i = 0; i < rows; i++) sums[i] = sums_begin(x->offsets[(row + i) * x->steps + step]);
        step_sums(half + step * size, kind, x, row, step, rows, sums);
        UNROLL for (int i = 0; i < rows; i++)
            total[i] = joined(total[i], sums_float(sums[i]), x->scales[(row + i) * x->steps + step], scales ? scales + step * PANEL : 0);
    }
    UNROLL for (int i = 0; i < rows; i++) v_store(out + i * PANEL, total[i]);
}

/* One or two rows by a panel in the order in which it lies: the processor asks for what follows by itself. */
INLINE void in_order(const uint8_t *panel, const float *scales, int kind, const dot_rows_t *x, int64_t row, int rows, float *out) {
    V total[2][2];
    UNROLL for (int half = 0; half < 2; half++)
        UNROLL for (int i = 0; i < rows; i++) total[half][i] = v_zero();
    for (int64_t step = 0; step < x->steps; step++)
        UNROLL for (int half = 0; half < 2; half++, panel += half_bytes(kind)) {
            SUMS sums[2];
            UNROLL for (int i = 0; i < rows; i++) sums[i] = sums_begin(x->offsets[(row + i) * x->steps + step]);
            step_sums(panel, kind, x, row, step, rows, sums);
            UNROLL for (int i = 0; i < rows; i++)
                total[half][i] = joined(total[half][i], sums_float(sums[i]), x->scales[(row + i) * x->steps + step],
                                        scales ? scales + step * PANEL + 16 * half : 0);
        }
    UNROLL for (int half = 0; half < 2; half++)
        UNROLL for (int i = 0; i < rows; i++) v_store(out + i * PANEL + 16 * half, total[half][i]);
}

#define CASE(n) \
    case n: few_rows(half, scales, kind, x, row, first, end, n, next, lines, out); break;

INLINE void some_rows(const uint8_t *half, const float *scales, int kind, const dot_rows_t *x, int64_t row, int64_t first, int64_t end,
                      int rows, const char *next, int64_t lines, float *out) {
    switch (rows) {
        CASE(1)
        CASE(2)
        CASE(3)
#if MAX_ROWS > 3
        CASE(4)
#endif
#if MAX_ROWS > 4
        CASE(5)
        CASE(6)
#endif
    }
}

/* Rows in blocks of nearly equal size, all of them by a chunk of steps before the next one, which is asked for meanwhile. */
INLINE void in_blocks(const uint8_t *panel, const float *scales, int kind, const dot_rows_t *x, int64_t top, int rows, float *out) {
    const int blocks = (rows + MAX_ROWS - 1) / MAX_ROWS, passes = 2 * blocks;
    const int64_t step_lines = 2 * half_bytes(kind) / 64;
    for (int64_t first = 0; first < x->steps; first += CHUNK) {
        const int64_t end = first + CHUNK < x->steps ? first + CHUNK : x->steps;
        const char *next = (const char *)panel + end * step_lines * 64;
        int pass = 0;
        for (int half = 0; half < 2; half++)
            for (int block = 0, row = 0; block < blocks; block++, pass++) {
                const int count = (rows - row + blocks - block - 1) / (blocks - block);
                const int64_t lines = step_lines * (pass + 1) / passes - step_lines * pass / passes;
                some_rows(panel + half * half_bytes(kind), scales ? scales + 16 * half : 0, kind, x, top + row, first, end, count, next,
                          lines, out + row * PANEL + 16 * half);
                next += lines * (end - first) * 64;
                row += count;
            }
    }
}

INLINE void panel_of_kind(const uint8_t *panel, const float *scales, int kind, const dot_rows_t *x, int64_t top, int rows, float *out) {
    switch (rows) {
    case 1: in_order(panel, scales, kind, x, top, 1, out); break;
    case 2: in_order(panel, scales, kind, x, top, 2, out); break;
    default: in_blocks(panel, scales, kind, x, top, rows, out);
    }
}

static void panel(const void *packed, const float *scales, int kind, const dot_rows_t *x, int64_t top, int rows, float *out) {
    if (kind == INT8)
        panel_of_kind(packed, 0, INT8, x, top, rows, out);
    else
        panel_of_kind(packed, scales, INT4, x, top, rows, out);
}

const dots_t DOTS = {
    panel,
#if defined(__AVX512VNNI__) || defined(DOTS_VNNI)
    0,
#else
    1,
#endif
};
