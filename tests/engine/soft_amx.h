/* AMX's tiles in plain C, for CPUs without them: amx.c is compiled with this, so that it is tested on every machine.
 * TDPBF16PS as the Intel SDM (vol. 2) has it: of a row's products the even and the odd ones are summed apart by fused
 * multiply-adds, both sums are added, then joined to the total. Denormals: as MXCSR says, which the kernel sets. */
#include <math.h>
#include <stdint.h>
#include <string.h>

static __thread unsigned char soft_tiles[8][16][64], soft_config[64];

static inline int soft_rows(int tile) { return soft_config[48 + tile]; }
static inline int soft_columns(int tile) { return soft_config[16 + 2 * tile] | soft_config[17 + 2 * tile] << 8; }

static inline void soft_load(int tile, const void *from, int64_t stride) {
    memset(soft_tiles[tile], 0, sizeof soft_tiles[tile]);
    for (int row = 0; row < soft_rows(tile); row++)
        memcpy(soft_tiles[tile][row], (const char *)from + row * stride, (size_t)soft_columns(tile));
}

static inline void soft_store(int tile, void *to, int64_t stride) {
    for (int row = 0; row < soft_rows(tile); row++)
        memcpy((char *)to + row * stride, soft_tiles[tile][row], (size_t)soft_columns(tile));
}

static inline float soft_float(uint16_t bf16) {
    const uint32_t bits = (uint32_t)bf16 << 16;
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

static inline void soft_multiply(int into, int a, int b) {
    for (int row = 0; row < soft_rows(into); row++) {
        float total[16], sums[2][16] = {{0}};
        uint16_t left[32], right[32];
        memcpy(total, soft_tiles[into][row], 64);
        memcpy(left, soft_tiles[a][row], 64);
        for (int pair = 0; pair < soft_columns(a) / 4; pair++) {
            memcpy(right, soft_tiles[b][pair], 64);
            for (int column = 0; column < soft_columns(into) / 4; column++)
                for (int odd = 0; odd < 2; odd++)
                    sums[odd][column] = fmaf(soft_float(left[2 * pair + odd]), soft_float(right[2 * column + odd]), sums[odd][column]);
        }
        for (int column = 0; column < soft_columns(into) / 4; column++) total[column] += sums[0][column] + sums[1][column];
        memcpy(soft_tiles[into][row], total, 64);
    }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) memcpy(soft_config, (from), 64)
#define _tile_release() memset(soft_config, 0, 64)
#define _tile_zero(tile) memset(soft_tiles[tile], 0, sizeof soft_tiles[tile])
#define _tile_loadd soft_load
#define _tile_stored soft_store
#define _tile_dpbf16ps soft_multiply
