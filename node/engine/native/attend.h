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

#if defined(__AVX512F__)
static inline void turn16(const char *from, int64_t stride, char *to) { /* 16 x 16 words of four bytes */
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
#endif

/* 32 keys [dim], one behind the other, as a panel: outputs are keys, inputs are what lies along `dim`. */
static void keys_as_panel(const char *keys, int64_t dim, int bf16, char *panel) {
    const int64_t row = dim * (bf16 ? 2 : 4), words = row / 4, all = (dim + STEP - 1) / STEP * (bf16 ? 16 : 32);
    const int64_t of_step = bf16 ? 16 : 32; /* words of a key that a step takes */
    for (int64_t word = 0; word < all; word += 16)
        for (int half = 0; half < 2; half++) {
            const char *from = keys + half * 16 * row + word * 4;
            char *to = panel + ((word / of_step * 2 + half) * of_step + word % of_step) * 64;
#if defined(__AVX512F__)
            if (word + 16 <= words) {
                turn16(from, row, to);
                continue;
            }
#endif
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

/* Asks for a block before it is needed: each is a page or so, and the processor's own prefetching ends with a page. */
static inline void fetch_block(const char *block, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) _mm_prefetch(block + line, _MM_HINT_T0);
}

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

/* `rows` of x [rows][steps * 32] by `count` panels into out [rows][stride]. */
static void by_panels(const char *panels, int64_t count, const char *x, int64_t steps, int64_t rows, int bf16, int tiles, float *tile,
                      float *out, int64_t stride) {
    const int kind = bf16 ? BF16 : FP32;
    for (int64_t top = 0; top < rows; top += 32) {
        const int some = (int)least(32, rows - top);
        if (tiles) {
            amx_panels((const uint16_t *)panels, count, (const uint16_t *)x + top * steps * STEP, steps, some, out + top * stride, stride);
            continue;
        }
        for (int64_t panel = 0; panel < count; panel++) {
            lanes_panel(panels + panel * steps * 2 * half_bytes(kind), NULL, kind, (const float *)x + top * steps * STEP, steps, some, tile);
            for (int row = 0; row < some; row++) memcpy(out + (top + row) * stride + panel * PANEL, tile + row * PANEL, PANEL * 4);
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

static void attend_item(const void *work, int64_t number) {
    const attend_t *a = work;
    const query_item_t *item = a->items + number;
    const layer_t *l = a->layer;
    const spans_t *s = a->spans;
    const unsigned before = flush_denormals();
    const int64_t dim = l->dim, shared = l->heads / l->kv_heads, position = s->position[item->span];
    const int64_t count = least(QUERIES, s->count[item->span] * shared - item->first);
    const int64_t lowest = position + item->first / shared, highest = position + (item->first + count - 1) / shared;
    const int64_t base = (l->window && lowest >= l->window ? lowest - l->window + 1 : 0) & ~(int64_t)(KEYS - 1);
    const int64_t blocks = highest / KEYS - base / KEYS + 1, width = blocks * KEYS, steps = (dim + STEP - 1) / STEP;
    const int tiles = use_amx && a->bf16;
    const int64_t size = a->bf16 ? 2 : 4, from = item->kv_head * s->stride[item->span] + base * dim;
    const char *keys = (const char *)a->keys[item->span] + from * size, *values = (const char *)a->values[item->span] + from * size;
    const int64_t panel_bytes = 2 * half_bytes(a->bf16 ? BF16 : FP32); /* of one step */
    const int64_t room = steps * BLOCKS > blocks ? steps * BLOCKS : blocks, widest = width > steps * STEP ? width : steps * STEP;
    reserve(&item_arena, (size_t)(count * (widest * 4 + width * 4 + 4) + room * panel_bytes + 64 * PANEL * 4 + 512));
    char *rows = carve(&item_arena, (size_t)(count * widest * 4)), *panel = carve(&item_arena, (size_t)(room * panel_bytes));
    float *scores = carve(&item_arena, (size_t)(count * width * 4)), *sums = carve(&item_arena, (size_t)count * 4);
    float *tile = carve(&item_arena, 32 * PANEL * 4), *out = carve(&item_arena, 32 * PANEL * 4);
    query_rows(a, item, shared, count, tiles, rows);
    for (int64_t block = 0; block < blocks; block += BLOCKS) {
        const int64_t some = least(BLOCKS, blocks - block);
        for (int64_t i = 0; i < some; i++) {
            if (block + i + 1 < blocks) fetch_block(keys + (block + i + 1) * KEYS * dim * size, KEYS * dim * size);
            keys_as_panel(keys + (block + i) * KEYS * dim * size, dim, a->bf16, panel + i * steps * panel_bytes);
        }
        by_panels(panel, some, rows, steps, count, a->bf16, tiles, tile, scores + block * KEYS, width);
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t at = position + (item->first + i) / shared;
        const int64_t first = l->window && at >= l->window ? at - l->window + 1 : 0;
        uint16_t *rounded = tiles ? (uint16_t *)rows + i * width : NULL;
        sums[i] = weigh(scores + i * width, width, first - base, at + 1 - base, l->scale, a->bf16, rounded);
    }
    const char *weights = tiles ? rows : (const char *)scores;
    for (int64_t column = 0; column < dim; column += PANEL) {
        for (int64_t block = 0; block < blocks; block++) {
            if (!column && block + 1 < blocks) fetch_block(values + (block + 1) * KEYS * dim * size, KEYS * dim * size);
            values_as_step(values + block * KEYS * dim * size, dim, column, a->bf16, panel + block * panel_bytes);
        }
        for (int64_t top = 0; top < count; top += 32) {
            const int64_t some = least(32, count - top);
            by_panels(panel, 1, weights + top * width * (tiles ? 2 : 4), blocks, some, a->bf16, tiles, tile, out, PANEL);
            for (int64_t i = 0; i < some; i++) {
                const int64_t query = item->first + top + i, row = s->row[item->span] + query / shared;
                const int64_t to = (row * l->heads + item->kv_head * shared + query % shared) * dim + column;
                for (int64_t j = 0; j < PANEL && column + j < dim; j += 16)
                    store_some(a->answers, to + j, dim - column - j, a->bf16, v_div(v_load(out + i * PANEL + j), v_set(sums[top + i])));
            }
        }
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
