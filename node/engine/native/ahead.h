/* Memory that is read soon, asked for meanwhile: what panel.h and dots.c have in common. */
#ifndef MESH_AHEAD_H
#define MESH_AHEAD_H

#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

/* One or two rows read the weights as fast as memory gives them: these are asked for shortly before, into the nearest
 * cache. More rows take longer for a chunk than memory does. (Zen 4: a quarter more bytes a second for one row.) */
#define NEAR(rows) ((rows) <= 2)
#define NEAR_BYTES 6144

INLINE const char *ask_for(const char *next, int64_t lines, const char *end, int near) {
    for (; lines > 0 && next < end; lines--, next += 64) {
        if (near)
            _mm_prefetch(next, _MM_HINT_T0);
        else
            _mm_prefetch(next, _MM_HINT_T1);
    }
    return next;
}

#endif
