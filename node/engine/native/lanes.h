/* Sixteen float32 lanes, as one AVX-512 register or as two of AVX2: every operation here is rounded correctly by
 * IEEE 754 (no reciprocal estimates), so code written over lanes gives the same bits on both. */
#ifndef MESH_LANES_H
#define MESH_LANES_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && !defined(LANES_256)

typedef __m512 V;
typedef __m512i VI;

static inline V v_zero(void) { return _mm512_setzero_ps(); }
static inline V v_set(float x) { return _mm512_set1_ps(x); }
static inline V v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, V a) { _mm512_storeu_ps(p, a); }
static inline V v_add(V a, V b) { return _mm512_add_ps(a, b); }
static inline V v_sub(V a, V b) { return _mm512_sub_ps(a, b); }
static inline V v_mul(V a, V b) { return _mm512_mul_ps(a, b); }
static inline V v_div(V a, V b) { return _mm512_div_ps(a, b); }
static inline V v_max(V a, V b) { return _mm512_max_ps(a, b); }
static inline V v_min(V a, V b) { return _mm512_min_ps(a, b); }
static inline V v_fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline V v_round(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

static inline V v_pow2(V whole) { /* 2 to a whole number in [-126, 127] */
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(whole), _mm512_set1_epi32(127)), 23));
}

static inline V v_load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}

static inline void v_store_bf16(uint16_t *p, V a) { /* to nearest, ties to even; NaN stays NaN */
    VI bits = _mm512_castps_si512(a);
    VI odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    VI rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256((void *)p, _mm512_cvtepi32_epi16(rounded));
}

static inline V v_load_fp16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }

static inline V v_load_even(const uint16_t *p) { /* the first of 16 pairs of bf16 */
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}
static inline V v_load_odd(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int)0xffff0000u)));
}

static inline void v_store_pairs(uint16_t *p, V even, V odd) { /* numbers that bf16 holds exactly */
    VI high = _mm512_and_si512(_mm512_castps_si512(odd), _mm512_set1_epi32((int)0xffff0000u));
    _mm512_storeu_si512(p, _mm512_or_si512(high, _mm512_srli_epi32(_mm512_castps_si512(even), 16)));
}

static inline void v_join_bf16(uint16_t *p, const uint16_t *even, const uint16_t *odd) { /* 16 pairs, one of each */
    VI low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)even));
    VI high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)odd));
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

#else

typedef struct {
    __m256 a, b;
} V;

#define BOTH(expression_a, expression_b) ((V){(expression_a), (expression_b)})

static inline V v_zero(void) { return BOTH(_mm256_setzero_ps(), _mm256_setzero_ps()); }
static inline V v_set(float x) { return BOTH(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
static inline V v_load(const float *p) { return BOTH(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
static inline void v_store(float *p, V a) {
    _mm256_storeu_ps(p, a.a);
    _mm256_storeu_ps(p + 8, a.b);
}
static inline V v_add(V x, V y) { return BOTH(_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
static inline V v_sub(V x, V y) { return BOTH(_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
static inline V v_mul(V x, V y) { return BOTH(_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
static inline V v_div(V x, V y) { return BOTH(_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
static inline V v_max(V x, V y) { return BOTH(_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
static inline V v_min(V x, V y) { return BOTH(_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)); }
static inline V v_fma(V x, V y, V z) { return BOTH(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)); }
#define NEAREST (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
static inline V v_round(V x) { return BOTH(_mm256_round_ps(x.a, NEAREST), _mm256_round_ps(x.b, NEAREST)); }

static inline __m256 half_pow2(__m256 whole) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23));
}
static inline V v_pow2(V whole) { return BOTH(half_pow2(whole.a), half_pow2(whole.b)); }

static inline __m256 half_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}
static inline V v_load_bf16(const uint16_t *p) { return BOTH(half_bf16(p), half_bf16(p + 8)); }

static inline void half_store_bf16(uint16_t *p, __m256 a) {
    __m256i bits = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    __m128i low = _mm256_castsi256_si128(rounded), high = _mm256_extracti128_si256(rounded, 1);
    _mm_storeu_si128((void *)p, _mm_packus_epi32(low, high));
}
static inline void v_store_bf16(uint16_t *p, V a) {
    half_store_bf16(p, a.a);
    half_store_bf16(p + 8, a.b);
}

static inline V v_load_fp16(const uint16_t *p) {
    return BOTH(_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)), _mm256_cvtph_ps(_mm_loadu_si128((const void *)(p + 8))));
}

static inline __m256 half_even(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const void *)p), 16));
}
static inline __m256 half_odd(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const void *)p), _mm256_set1_epi32((int)0xffff0000u)));
}
static inline V v_load_even(const uint16_t *p) { return BOTH(half_even(p), half_even(p + 16)); }
static inline V v_load_odd(const uint16_t *p) { return BOTH(half_odd(p), half_odd(p + 16)); }

static inline void half_join_bf16(uint16_t *p, const uint16_t *even, const uint16_t *odd) {
    __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)even));
    __m256i high = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)odd));
    _mm256_storeu_si256((void *)p, _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
}
static inline void v_join_bf16(uint16_t *p, const uint16_t *even, const uint16_t *odd) {
    half_join_bf16(p, even, odd);
    half_join_bf16(p + 16, even + 8, odd + 8);
}

static inline __m256i half_join(__m256 even, __m256 odd) {
    __m256i high = _mm256_and_si256(_mm256_castps_si256(odd), _mm256_set1_epi32((int)0xffff0000u));
    return _mm256_or_si256(high, _mm256_srli_epi32(_mm256_castps_si256(even), 16));
}
static inline void v_store_pairs(uint16_t *p, V even, V odd) {
    _mm256_storeu_si256((void *)p, half_join(even.a, odd.a));
    _mm256_storeu_si256((void *)(p + 16), half_join(even.b, odd.b));
}

#endif

static inline float v_sum(V a) { /* in one fixed order */
    float lane[16];
    v_store(lane, a);
    for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; i++) lane[i] += lane[i + step];
    return lane[0];
}

static inline V v_exp(V x) { /* within 2 units in the last place; below -87 nearly nothing, above 88 huge but finite */
    x = v_min(v_max(x, v_set(-87.0f)), v_set(88.0f));
    V whole = v_round(v_mul(x, v_set(1.44269504f)));
    V rest = v_fma(whole, v_set(-0.693359375f), x); /* ln 2 in two parts, the first exact in products */
    rest = v_fma(whole, v_set(2.12194440e-4f), rest);
    V sum = v_set(1.0f / 5040);
    sum = v_fma(sum, rest, v_set(1.0f / 720));
    sum = v_fma(sum, rest, v_set(1.0f / 120));
    sum = v_fma(sum, rest, v_set(1.0f / 24));
    sum = v_fma(sum, rest, v_set(1.0f / 6));
    sum = v_fma(sum, rest, v_set(0.5f));
    sum = v_fma(sum, rest, v_set(1.0f));
    sum = v_fma(sum, rest, v_set(1.0f));
    return v_mul(sum, v_pow2(whole));
}

static inline V v_silu(V x) { return v_div(x, v_add(v_set(1.0f), v_exp(v_sub(v_zero(), x)))); }

#endif
