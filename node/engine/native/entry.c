/* What Python calls: chooses the instructions once, and packs weights. */
#define _GNU_SOURCE
#include "mesh.h"

#include <cpuid.h>
#include <math.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

int use_amx;
const dots_t *dots;
static const rows_t *rows;

static int64_t saved_registers(void) {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (int64_t)high << 32 | low;
}

static int has_avx512(void) {
    uint32_t a, b, c, d;
    const uint32_t wanted = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & wanted) == wanted && (saved_registers() & 0xe6) == 0xe6;
}

/* The best of `enum isa` that CPU, kernel and this build allow. */
static int best(void) {
    uint32_t a, b, c, d, b7, d7, unused;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_FMA) || !(c & bit_F16C)) return NONE;
    if (!__get_cpuid_count(7, 0, &unused, &b7, &unused, &d7) || !(b7 & bit_AVX2)) return NONE;
    const int64_t saved = saved_registers();
    if ((saved & 6) != 6) return NONE;
#if defined(SOFT_AMX)
    return AMX;
#endif
    if (!has_avx512()) return AVX2;
#if defined(WITH_AMX)
    const int has_tiles = (d7 >> 24 & 1) && (d7 >> 22 & 1) && (saved & 0x60000) == 0x60000;
    if (has_tiles && !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */)) return AMX;
#endif
    return AVX512;
}

/* The quickest way to sum products of bytes that CPU and this build allow. `use`: the vectors that are settled; `most`: those
 * asked for, for AVX-VNNI came after AVX-512 but needs none of it. */
static const dots_t *best_dots(int use, int most) {
    uint32_t a, b, c, d;
    if (most < AVX512 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return &dots_avx2;
    const int with_avx512 = use >= AVX512 && has_avx512() && (c >> 11 & 1), with_avx = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
#if defined(DOTS_256) /* a test: the code for AVX-VNNI, in the encoding of AVX-512 */
    return with_avx512 ? &dots_avx_vnni : &dots_avx2;
#endif
#if defined(WITH_AVX512_VNNI)
    if (with_avx512) return &dots_avx512_vnni;
#endif
#if defined(WITH_AVX_VNNI)
    if (with_avx) return &dots_avx_vnni;
#endif
    (void)with_avx512, (void)with_avx;
    return &dots_avx2;
}

/* Settles the instructions: at most `most`. Gives what was settled, NONE where nothing here can run. */
EXPORT int mesh_use(int most) {
    const int can = best(), use = can < most ? can : most;
    use_amx = use == AMX;
    dots = best_dots(use, most);
    rows = use == NONE ? 0 : use >= AVX512 && has_avx512() ? &rows_avx512 : &rows_avx2;
    return use;
}

EXPORT void mesh_product(const product_t *p, const void *x, int64_t count, int bf16, const void *add, void *out, int out_bf16, int threads) {
    rows->product(p, x, count, bf16, add, out, out_bf16, threads);
}

EXPORT void mesh_layers(const layer_t *const *layers, int64_t count, void *x, const int64_t *positions, const float *turns, int64_t rows_in,
                 int bf16, const spans_t *spans, int threads) {
    rows->layers(layers, count, x, positions, turns, rows_in, bf16, spans, threads);
}

EXPORT void mesh_logits(const product_t *p, const float *norm, float eps, const void *x, int64_t count, int bf16, float *out, int threads) {
    rows->logits(p, norm, eps, x, count, bf16, out, threads);
}

/* ---- packing */

typedef struct {
    const void *weight; /* [n][k], the first of a BF16 or FP16 element's bytes least; whole numbers int8 for INT8 and INT4 */
    char *packed;       /* zeros at first */
    int64_t n, k;
    int kind;
} pack_t;

/* Where a whole number goes. */
static uint8_t *packed_byte(const pack_t *p, int64_t panel, int64_t output, int64_t input) {
    const int64_t steps = (p->k + STEP - 1) / STEP, half = (panel * steps + input / STEP) * 2 + output % PANEL / 16;
    const int64_t quad = input % STEP / 4, line = p->kind == INT8 ? quad : quad / 2;
    return (uint8_t *)p->packed + half * half_bytes(p->kind) + line * 64 + output % 16 * 4 + input % 4;
}

static void pack_panel(const void *work, int64_t panel) {
    const pack_t *p = work;
    const int64_t steps = (p->k + STEP - 1) / STEP;
    const int64_t end = (panel + 1) * PANEL < p->n ? (panel + 1) * PANEL : p->n;
    for (int64_t output = panel * PANEL; output < end; output++) {
        const int64_t half = output % PANEL / 16, lane = output % 16;
        for (int64_t input = 0; input < p->k; input++) {
            const int64_t from = output * p->k + input, pair = input % STEP / 2, odd = input % 2;
            const int64_t at = ((panel * steps + input / STEP) * 2 + half) * 16 + pair; /* pairs before this one */
            switch (p->kind) {
            case BF16: ((uint16_t *)p->packed)[at * 32 + lane * 2 + odd] = ((const uint16_t *)p->weight)[from]; break;
            case FP16: ((uint16_t *)p->packed)[at * 32 + odd * 16 + lane] = ((const uint16_t *)p->weight)[from]; break;
            case INT8: packed_byte(p, panel, output, input)[0] = (uint8_t)(((const int8_t *)p->weight)[from] + 128); break;
            case INT4:
                packed_byte(p, panel, output, input)[0] |= (uint8_t)((((const int8_t *)p->weight)[from] + 8) << (input / 4 % 2 ? 4 : 0));
                break;
            default: ((float *)p->packed)[at * 32 + odd * 16 + lane] = ((const float *)p->weight)[from];
            }
        }
    }
}

EXPORT void mesh_pack(int kind, const void *weight, int64_t n, int64_t k, void *packed, int threads) {
    const pack_t work = {weight, packed, n, k, kind};
    pool_run(pack_panel, &work, (n + PANEL - 1) / PANEL, threads);
}
