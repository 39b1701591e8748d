/* Memory that is read soon, asked for meanwhile: what panel.h and dots.c have in common. */
#ifndef MESH_AHEAD_H
#define MESH_AHEAD_H

#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

INLINE const char *ask_for(const char *next, int64_t lines, const char *end) {
    for (; lines > 0 && next < end; lines--, next += 64) _mm_prefetch(next, _MM_HINT_T1);
    return next;
}

#endif
