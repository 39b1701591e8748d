/* One panel by tile multiplication. What TDPBF16PS computes is fixed: of 32 products the even and the odd ones are summed
 * apart by fused multiply-adds, both sums are added, then joined to the total, denormals taken as zero (Intel SDM vol. 2).
 * rows.c computes exactly that without tiles. A row's result does not depend on the rows beside it. */
#include "lanes.h"
#include "mesh.h"

#if defined(SOFT_AMX) /* a test: tiles in plain C */
#include SOFT_AMX
#endif

#define AHEAD 1024 /* bytes; measured: 14 GB/s without, 17 with, on a core that reads 15 by plain loads */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config_t;

/* Tiles 0 to 3: sums of the first 16 rows and of the others, by halves of the panel. 4, 5: rows. 6, 7: weights. */
static void configure(int upper, int lower) {
    tile_config_t config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    const int rows[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
    for (int tile = 0; tile < 8; tile++) {
        config.rows[tile] = (uint8_t)(rows[tile] ? rows[tile] : 1);
        config.row_bytes[tile] = 64;
    }
    _tile_loadconfig(&config);
}

static inline void fetch(const uint16_t *step) {
    const char *at = (const char *)step + AHEAD;
    for (int line = 0; line < 2048; line += 64) _mm_prefetch(at + line, _MM_HINT_T1);
}

void amx_panel(const uint16_t *panel, const uint16_t *x, int64_t steps, int rows, int first, float *out) {
    const int upper = rows < 16 ? rows : 16, lower = rows - upper;
    const int64_t stride = steps * STEP * 2;
    configure(upper, lower);
    _tile_zero(0);
    _tile_zero(1);
    if (lower) {
        const uint16_t *below = x + 16 * steps * STEP;
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t step = 0; step < steps; step++, panel += 1024) {
            if (first) fetch(panel);
            _tile_loadd(6, panel, 64);
            _tile_loadd(7, panel + 512, 64);
            _tile_loadd(4, x + step * STEP, stride);
            _tile_loadd(5, below + step * STEP, stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(2, out + 16 * PANEL, PANEL * 4);
        _tile_stored(3, out + 16 * PANEL + 16, PANEL * 4);
    } else {
        for (int64_t step = 0; step < steps; step++, panel += 1024) {
            if (first) fetch(panel);
            _tile_loadd(4, x + step * STEP, stride);
            _tile_loadd(6, panel, 64);
            _tile_loadd(7, panel + 512, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
    }
    _tile_stored(0, out, PANEL * 4);
    _tile_stored(1, out + 16, PANEL * 4);
    _tile_release();
}

void amx_panels(const uint16_t *panels, int64_t count, const uint16_t *x, int64_t x_stride, int64_t steps, int rows, int begun,
                float *out, int64_t stride) {
    const int upper = rows < 16 ? rows : 16, lower = rows - upper;
    const int64_t x_bytes = x_stride * 2, out_bytes = stride * 4;
    const uint16_t *below = x + 16 * x_stride;
    configure(upper, lower);
    for (int64_t panel = 0; panel < count; panel++, out += PANEL) {
        if (begun) {
            _tile_loadd(0, out, out_bytes);
            _tile_loadd(1, out + 16, out_bytes);
        } else {
            _tile_zero(0);
            _tile_zero(1);
        }
        if (begun && lower) {
            _tile_loadd(2, out + 16 * stride, out_bytes);
            _tile_loadd(3, out + 16 * stride + 16, out_bytes);
        } else {
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t step = 0; step < steps; step++, panels += 1024) {
            _tile_loadd(6, panels, 64);
            _tile_loadd(7, panels + 512, 64);
            _tile_loadd(4, x + step * STEP, x_bytes);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (!lower) continue;
            _tile_loadd(5, below + step * STEP, x_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, out, out_bytes);
        _tile_stored(1, out + 16, out_bytes);
        if (!lower) continue;
        _tile_stored(2, out + 16 * stride, out_bytes);
        _tile_stored(3, out + 16 * stride + 16, out_bytes);
    }
    _tile_release();
}

void amx_panel_scaled(const uint16_t *panel, const float *scales, const uint16_t *x, const float *row_scales, int64_t steps, int rows,
                      float *out) {
    float sums[16 * PANEL] __attribute__((aligned(64)));
    const int64_t stride = steps * STEP * 2;
    for (int top = 0; top < rows; top += 16) {
        const int count = rows - top < 16 ? rows - top : 16;
        float *totals = out + top * PANEL;
        memset(totals, 0, (size_t)count * PANEL * 4);
        configure(count, 0);
        for (int64_t step = 0; step < steps; step++) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_loadd(4, x + top * steps * STEP + step * STEP, stride);
            _tile_loadd(6, panel + step * 1024, 64);
            _tile_loadd(7, panel + step * 1024 + 512, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_stored(0, sums, PANEL * 4);
            _tile_stored(1, sums + 16, PANEL * 4);
            for (int half = 0; half < PANEL; half += 16) {
                for (int row = 0; row < count; row++) {
                    float *total = totals + row * PANEL + half;
                    V by = v_set(row_scales[(top + row) * steps + step]);
                    if (scales) by = v_mul(by, v_load(scales + step * PANEL + half));
                    v_store(total, v_fma(by, v_load(sums + row * PANEL + half), v_load(total)));
                }
            }
        }
        _tile_release();
    }
}
