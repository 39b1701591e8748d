/* Causal attention over the rows of a step, part of rows.c. A query's keys are taken in blocks of 32 that begin at whole
 * multiples of 32 positions; scores and weighted values are products as all others are, the block's keys as outputs of the
 * first and as inputs of the second. So a query's result depends on its position and its sequence alone: neither on the
 * queries beside it nor on how the sequence was cut. Keys that it may not see weigh exactly zero. */

#define QUERIES 64 /* a head's, of one sequence, that share one reading of its keys */
#define KEYS 32    /* a block */
#define BLOCKS 8   /* of keys that are made ready together */

typedef struct {
    int64_t span, kv_head, first; /* first: of the span's queries for this head, all heads of a row after one another */
} query_item_t;

typedef struct {
    const layer_t *layer;
    const spans_t *spans;
    const int64_t *keys, *values; /* addresses, one a span */
    const query_item_t *items;
    const void *qkv;
    void *answers; /* [rows][heads * dim] */
    int bf16;
} attend_t;

static __thread arena_t step_arena, item_arena;

/* ---- keys and values as weights */

/* 16 rows of 16 words of four bytes into columns, 64 bytes each. */
#if defined(__AVX512F__)
static inline void turn16(const char *from, int64_t stride, char *to) {
    VI r[16], t[16];
    UNROLL16 for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + i * stride);
    UNROLL16 for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    UNROLL16 for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLL16 for (int i = 0; i < 4; i++) { /* each quarter of r[i] is now a column of four rows */
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[8 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    UNROLL16 for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(to + 64 * i, _mm512_shuffle_i32x4(t[i], t[4 + i], 0x88));
        _mm512_storeu_si512(to + 64 * (4 + i), _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0x88));
        _mm512_storeu_si512(to + 64 * (8 + i), _mm512_shuffle_i32x4(t[i], t[4 + i], 0xdd));
        _mm512_storeu_si512(to + 64 * (12 + i), _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0xdd));
    }
}
#else
/* 4 words of each of 8 rows, as 4 columns of 8: the lower half of a register takes the first four rows. */
static inline void turn8(const char *from, int64_t stride, char *to) {
    __m256 r[4], t[4];
    UNROLL for (int i = 0; i < 4; i++) {
        const __m128 high = _mm_loadu_ps((const float *)(from + (i + 4) * stride));
        r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps((const float *)(from + i * stride))), high, 1);
    }
    UNROLL for (int i = 0; i < 4; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    UNROLL for (int i = 0; i < 2; i++) {
        _mm256_storeu_ps((float *)(to + 128 * i), _mm256_shuffle_ps(t[i], t[2 + i], 0x44));
        _mm256_storeu_ps((float *)(to + 128 * i + 64), _mm256_shuffle_ps(t[i], t[2 + i], 0xee));
    }
}

static inline void turn16(const char *from, int64_t stride, char *to) {
    for (int row = 0; row < 16; row += 8)
        UNROLL for (int word = 0; word < 16; word += 4) turn8(from + row * stride + word * 4, stride, to + word * 64 + row * 4);
}
#endif

/* 32 keys [dim], one behind the other, as a panel: outputs are keys, inputs are what lies along `dim`. */
static void keys_as_panel(const char *keys, int64_t dim, int bf16, char *panel) {
    const int64_t row = dim * (bf16 ? 2 : 4), words = row / 4, all = (dim + STEP - 1) / STEP * (bf16 ? 16 : 32);
    const int64_t of_step = bf16 ? 16 : 32; /* words of a key that a step takes */
    for (int64_t word = 0; word < all; word += 16)
        for (int half = 0; half < 2; half++) {
            const char *from = keys + half * 16 * row + word * 4;
            char *to = panel + ((word / of_step * 2 + half) * of_step + word % of_step) * 64;
            if (word + 16 <= words) {
                turn16(from, row, to);
                continue;
            }
            const int64_t count = words - word < 16 ? words - word : 16;
            for (int64_t i = 0; i < 16; i++)
                for (int key = 0; key < 16; key++) {
                    uint32_t number = 0;
                    if (i < count) memcpy(&number, from + key * row + 4 * i, 4);
                    memcpy(to + i * 64 + key * 4, &number, 4);
                }
        }
}

/* 32 values as one step of a panel of the 32 outputs from `first` on. */
static void values_as_step(const char *values, int64_t dim, int64_t first, int bf16, char *step) {
    const int64_t size = bf16 ? 2 : 4, row = dim * size;
    for (int half = 0; half < 2; half++) {
        const int64_t column = first + 16 * half, count = dim - column;
        for (int pair = 0; pair < 16; pair++) {
            const char *even = values + 2 * pair * row + column * size, *odd = even + row;
            if (bf16) {
                char *to = step + half * 1024 + pair * 64;
                if (count >= 16) {
                    v_join_bf16((uint16_t *)to, (const uint16_t *)even, (const uint16_t *)odd);
                    continue;
                }
                for (int64_t i = 0; i < 16; i++) {
                    memset(to + 4 * i, 0, 4);
                    if (i >= count) continue;
                    memcpy(to + 4 * i, even + 2 * i, 2);
                    memcpy(to + 4 * i + 2, odd + 2 * i, 2);
                }
            } else {
                char *to = step + half * 2048 + pair * 128;
                const size_t whole = count >= 16 ? 64 : count > 0 ? (size_t)count * 4 : 0;
                memset(to, 0, 128);
                memcpy(to, even, whole);
                memcpy(to + 64, odd, whole);
            }
        }
    }
}

/* ---- one item */

/* Makes weights of a query's scores: of keys [first, end) of `count`; all others become zero. Gives their sum. */
static float weigh(float *scores, int64_t count, int64_t first, int64_t end, float scale, int bf16, uint16_t *rounded) {
    for (int64_t i = 0; i < first; i++) scores[i] = -3.4e38f;
    for (int64_t i = end; i < count; i++) scores[i] = -3.4e38f;
    V most = v_set(-3.4e38f);
    for (int64_t i = 0; i < count; i += 16) most = v_max(most, v_load(scores + i));
    float lanes[16];
    v_store(lanes, most);
    for (int i = 1; i < 16; i++) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    const V by = v_set(scale), less = v_set(-lanes[0] * scale);
    for (int64_t i = first & ~15; i < end; i += 16) v_store(scores + i, v_exp(v_fma(v_load(scores + i), by, less)));
    for (int64_t i = 0; i < first; i++) scores[i] = 0;
    for (int64_t i = end; i < count; i++) scores[i] = 0;
    V sum = v_zero();
    for (int64_t i = 0; i < count; i += 16) {
        V weight = v_load(scores + i);
        if (bf16) {
            uint16_t some[16], *at = rounded ? rounded + i : some;
            v_store_bf16(at, weight);
            weight = v_load_bf16(at);
            if (!rounded) v_store(scores + i, weight);
        }
        sum = v_add(sum, weight);
    }
    return v_sum(sum);
}

/* `rows` of x [rows][stride] by `count` panels of `steps` steps, into out [rows][out_stride], one panel's 32 columns beside
 * the other's; added to what is there if `begun`. Meanwhile `next` is asked for. */
typedef struct {
    const char *panels;
    int64_t count, steps;
    const void *x; /* bf16 for tiles, else float32 */
    int64_t stride;
    float *out;
    int64_t out_stride;
    int begun;
    const char *next;
    int64_t next_bytes;
} by_panels_t;

static void by_panels(const by_panels_t *work, int64_t rows, int bf16, int tiles) {
    const int kind = bf16 ? BF16 : FP32;
    const int64_t tops = (rows + 31) / 32, share = work->next_bytes / (tops * work->count);
    for (int64_t top = 0; top < rows; top += 32) {
        const int some = (int)least(32, rows - top);
        float *out = work->out + top * work->out_stride;
        if (tiles) {
            const uint16_t *x = (const uint16_t *)work->x + top * work->stride;
            amx_panels((const uint16_t *)work->panels, work->count, x, work->stride, work->steps, some, work->begun, out, work->out_stride);
            continue;
        }
        for (int64_t panel = 0; panel < work->count; panel++) {
            const lanes_t lanes = {(const float *)work->x + top * work->stride, work->stride, work->steps, out + panel * PANEL,
                                   work->out_stride, work->begun, work->next + (top / 32 * work->count + panel) * share, share};
            lanes_cached_panel(work->panels + panel * work->steps * 2 * half_bytes(kind), kind, &lanes, some);
        }
    }
}

static void query_rows(const attend_t *a, const query_item_t *item, int64_t shared, int64_t count, int tiles, char *to) {
    const layer_t *l = a->layer;
    const int64_t all = l->heads + 2 * l->kv_heads, wide = round_up(l->dim, STEP);
    for (int64_t i = 0; i < count; i++) {
        const int64_t query = item->first + i, row = a->spans->row[item->span] + query / shared;
        const int64_t at = (row * all + item->kv_head * shared + query % shared) * l->dim;
        if (tiles) {
            uint16_t *target = (uint16_t *)to + i * wide;
            memcpy(target, (const uint16_t *)a->qkv + at, (size_t)l->dim * 2);
            memset(target + l->dim, 0, (size_t)(wide - l->dim) * 2);
        } else {
            float *target = (float *)to + i * wide;
            for (int64_t j = 0; j < wide; j += 16)
                v_store(target + j, j < l->dim ? load_some(a->qkv, at + j, l->dim - j, a->bf16) : v_zero());
        }
    }
}

/* What attend_item works on. */
typedef struct {
    const attend_t *a;
    const query_item_t *item;
    int64_t position, count, base, blocks, width, steps; /* count: queries; base: the first key; width: keys; steps: of dim */
    int64_t block_bytes, panel_bytes;                     /* of 32 keys as they lie; of one step of a panel */
    int tiles;
    char *rows;    /* queries, later weights as tiles take them */
    char *panel;   /* BLOCKS blocks, made ready */
    float *scores; /* [count][width] */
    float *sums;   /* [count] */
    float *out;    /* [count][steps * 32] */
} item_t;

static item_t begin_item(const attend_t *a, const query_item_t *item) {
    const layer_t *l = a->layer;
    const int64_t dim = l->dim, shared = l->heads / l->kv_heads, position = a->spans->position[item->span];
    const int64_t count = least(QUERIES, a->spans->count[item->span] * shared - item->first);
    const int64_t lowest = position + item->first / shared, highest = position + (item->first + count - 1) / shared;
    const int64_t base = (l->window && lowest >= l->window ? lowest - l->window + 1 : 0) & ~(int64_t)(KEYS - 1);
    const int64_t blocks = highest / KEYS - base / KEYS + 1, width = blocks * KEYS, steps = (dim + STEP - 1) / STEP;
    const int64_t panel_bytes = 2 * half_bytes(a->bf16 ? BF16 : FP32), widest = width > steps * STEP ? width : steps * STEP;
    item_t made = {.a = a, .item = item, .position = position, .count = count, .base = base, .blocks = blocks, .width = width};
    made.steps = steps;
    made.block_bytes = KEYS * dim * (a->bf16 ? 2 : 4);
    made.panel_bytes = panel_bytes;
    made.tiles = use_amx && a->bf16;
    reserve(&item_arena, (size_t)(count * (widest * 4 + width * 4 + steps * STEP * 4 + 4) + BLOCKS * steps * panel_bytes + 5 * 64));
    made.rows = carve(&item_arena, (size_t)(count * widest * 4));
    made.panel = carve(&item_arena, (size_t)(BLOCKS * steps * panel_bytes));
    made.scores = carve(&item_arena, (size_t)(count * width * 4));
    made.sums = carve(&item_arena, (size_t)count * 4);
    made.out = carve(&item_arena, (size_t)(count * steps * STEP * 4));
    return made;
}

static const char *first_block(const item_t *m, const int64_t *places) {
    const spans_t *s = m->a->spans;
    const int64_t from = m->item->kv_head * s->stride[m->item->span] + m->base * m->a->layer->dim;
    return (const char *)places[m->item->span] + from * (m->a->bf16 ? 2 : 4);
}

static void score(const item_t *m) {
    const char *keys = first_block(m, m->a->keys);
    const int64_t dim = m->a->layer->dim, bytes = m->block_bytes;
    for (int64_t block = 0; block < m->blocks; block += BLOCKS) {
        const int64_t some = least(BLOCKS, m->blocks - block), rest = m->blocks - block - some;
        for (int64_t i = 0; i < some; i++)
            keys_as_panel(keys + (block + i) * bytes, dim, m->a->bf16, m->panel + i * m->steps * m->panel_bytes);
        const by_panels_t work = {m->panel, some, m->steps, m->rows, m->steps * STEP, m->scores + block * KEYS, m->width, 0,
                                  keys + (block + some) * bytes, least(BLOCKS, rest) * bytes};
        by_panels(&work, m->count, m->a->bf16, m->tiles);
    }
}

static void weigh_scores(const item_t *m) {
    const layer_t *l = m->a->layer;
    const int64_t shared = l->heads / l->kv_heads;
    for (int64_t i = 0; i < m->count; i++) {
        const int64_t at = m->position + (m->item->first + i) / shared;
        const int64_t first = l->window && at >= l->window ? at - l->window + 1 : 0;
        uint16_t *rounded = m->tiles ? (uint16_t *)m->rows + i * m->width : NULL;
        m->sums[i] = weigh(m->scores + i * m->width, m->width, first - m->base, at + 1 - m->base, l->scale, m->a->bf16, rounded);
    }
}

static void sum_values(const item_t *m) {
    const char *values = first_block(m, m->a->values);
    const int64_t dim = m->a->layer->dim, bytes = m->block_bytes;
    for (int64_t block = 0; block < m->blocks; block += BLOCKS) {
        const int64_t some = least(BLOCKS, m->blocks - block), rest = m->blocks - block - some;
        for (int64_t i = 0; i < some; i++)
            for (int64_t column = 0; column < m->steps; column++)
                values_as_step(values + (block + i) * bytes, dim, column * PANEL, m->a->bf16, m->panel + (column * some + i) * m->panel_bytes);
        const char *x = m->tiles ? m->rows + block * KEYS * 2 : (const char *)(m->scores + block * KEYS);
        const by_panels_t work = {m->panel, m->steps, some, x, m->width, m->out, m->steps * STEP, block > 0,
                                  values + (block + some) * bytes, least(BLOCKS, rest) * bytes};
        by_panels(&work, m->count, m->a->bf16, m->tiles);
    }
}

static void attend_item(const void *work, int64_t number) {
    const attend_t *a = work;
    const layer_t *l = a->layer;
    const query_item_t *item = a->items + number;
    const unsigned before = flush_denormals();
    const int64_t dim = l->dim, shared = l->heads / l->kv_heads;
    const item_t m = begin_item(a, item);
    query_rows(a, item, shared, m.count, m.tiles, m.rows);
    score(&m);
    weigh_scores(&m);
    sum_values(&m);
    for (int64_t i = 0; i < m.count; i++) {
        const int64_t query = item->first + i, row = a->spans->row[item->span] + query / shared;
        const int64_t to = (row * l->heads + item->kv_head * shared + query % shared) * dim;
        for (int64_t j = 0; j < dim; j += 16)
            store_some(a->answers, to + j, dim - j, a->bf16, v_div(v_load(m.out + i * m.steps * STEP + j), v_set(m.sums[i])));
    }
    _mm_setcsr(before);
}

/* ---- a step */

static void store_keys_and_values(const attend_t *a) {
    const layer_t *l = a->layer;
    const spans_t *s = a->spans;
    const int64_t size = a->bf16 ? 2 : 4, one = l->dim * size, all = l->heads + 2 * l->kv_heads;
    for (int64_t span = 0; span < s->spans; span++)
        for (int64_t i = 0; i < s->count[span]; i++) {
            const char *from = (const char *)a->qkv + ((s->row[span] + i) * all + l->heads) * one;
            for (int64_t head = 0; head < l->kv_heads; head++) {
                const int64_t at = (head * s->stride[span] + (s->position[span] + i) * l->dim) * size;
                memcpy((char *)a->keys[span] + at, from + head * one, (size_t)one);
                memcpy((char *)a->values[span] + at, from + (l->kv_heads + head) * one, (size_t)one);
            }
        }
}

static int64_t queries_in_items(const layer_t *l, const spans_t *s, query_item_t *items) { /* counts; writes unless null */
    const int64_t shared = l->heads / l->kv_heads;
    int64_t count = 0;
    for (int64_t span = 0; span < s->spans; span++)
        for (int64_t head = 0; head < l->kv_heads; head++)
            for (int64_t first = 0; first < s->count[span] * shared; first += QUERIES, count++)
                if (items) items[count] = (query_item_t){span, head, first};
    return count;
}

static void layers(const layer_t *const *list, int64_t count, void *x, const int64_t *positions, const float *turns, int64_t rows, int bf16,
                   const spans_t *spans, int threads) {
    const layer_t *one = list[0];
    const int64_t items = queries_in_items(one, spans, NULL), size = bf16 ? 2 : 4;
    const int64_t answered = rows * one->heads * one->dim * size, all = rows * (one->heads + 2 * one->kv_heads) * one->dim * size;
    reserve(&step_arena, (size_t)(items * (int64_t)sizeof(query_item_t) + answered + all + 256));
    query_item_t *work = carve(&step_arena, (size_t)items * sizeof(query_item_t));
    void *qkv = carve(&step_arena, (size_t)all), *answers = carve(&step_arena, (size_t)answered);
    queries_in_items(one, spans, work);
    memset(answers, 0, (size_t)answered); /* rows outside every span stay zero */
    for (int64_t number = 0; number < count; number++) {
        const layer_t *l = list[number];
        before_attention(l, x, positions, turns, rows, bf16, qkv, threads);
        const int64_t at = number * spans->spans;
        const attend_t attend = {l, spans, spans->keys + at, spans->values + at, work, qkv, answers, bf16};
        store_keys_and_values(&attend);
        pool_run(attend_item, &attend, items, threads);
        after_attention(l, answers, x, rows, bf16, threads);
    }
}
