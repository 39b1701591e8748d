/* Rows made ready for a product, part of rows.c: normed, if there is a norm before it, and in the form that the product
 * takes: float32 for lanes, bfloat16 for tiles, whole numbers of eight bits for INT8 and INT4. */

typedef struct {
    int64_t rows;
    const float *fp32; /* [rows][stride], where lanes are to be used */
    int64_t stride;
    const uint16_t *bf16; /* [rows][steps * 32], where tiles are */
    dot_rows_t dots;      /* INT8 and INT4 */
} input_t;

typedef struct {
    const product_t *product;
    const void *x; /* [rows][k] */
    int bf16;
    const float *norm; /* [k] or null: taken as they are */
    float eps;
    float *fp32; /* what is to be written, as in input_t; the others are null */
    uint16_t *tiles;
    int64_t stride;
    dot_rows_t dots;
} ready_t;

static inline int in_whole_numbers(const product_t *p) { return p->kind == INT8 || p->kind == INT4; }

static inline int by_tiles(const product_t *p, int64_t rows, int bf16) {
    return use_amx && (in_whole_numbers(p) ? rows > FEW_ROWS : p->kind == BF16 && bf16);
}

/* A stride that is no large power of two: rows at the same place of many pages would share a few lines of a cache. */
static inline int64_t lane_stride(const product_t *p) { return steps_of(p) * STEP + 16; }

/* Rounds a step's inputs to whole numbers, the largest to 127 or -127. A step with a NaN or an infinity has the scale NaN,
 * so its row's sums are NaN, on every machine alike. */
static inline void round_step(const float *x, const ready_t *r, int64_t row, int64_t step) {
    const dot_rows_t *dots = &r->dots;
    const int64_t at = row * dots->steps + step;
    uint32_t bits[STEP], most = 0;
    memcpy(bits, x, sizeof bits);
    for (int i = 0; i < STEP; i++) most = (bits[i] & 0x7fffffff) > most ? bits[i] & 0x7fffffff : most;
    float largest, numbers[STEP];
    memcpy(&largest, &most, 4);
    const int usable = most < 0x7f800000 && largest > 1e-35f; /* below, 127 / largest would be infinite */
    const V by = v_set(usable ? 127.0f / largest : 0.0f);
    for (int i = 0; i < STEP; i += 16) v_store(numbers + i, usable ? v_round(v_mul(v_load(x + i), by)) : v_zero());
    dots->scales[at] = most >= 0x7f800000 ? __builtin_nanf("") : usable ? largest / 127.0f : 0.0f;
    int32_t sum = 0;
    for (int i = 0; i < STEP; i++) {
        const int32_t number = (int32_t)numbers[i];
        sum += number;
        dots->numbers[at * STEP + i] = (int8_t)number;
        if (dots->words) dots->words[at * STEP + i] = (int16_t)number;
    }
    dots->offsets[at] = -sum * (r->product->kind == INT8 ? 128 : 8);
    if (r->tiles)
        for (int i = 0; i < STEP; i += 16) v_store_bf16(r->tiles + at * STEP + i, v_load(numbers + i));
}

static float norm_factor(const void *x, int64_t from, int64_t count, int bf16, float eps) {
    V squares = v_zero();
    for (int64_t at = 0; at < count; at += 16) {
        const V some = load_some(x, from + at, count - at, bf16);
        squares = v_fma(some, some, squares);
    }
    const float mean = v_sum(squares) / (float)count + eps;
    return 1.0f / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(mean)));
}

static void ready_row(const void *work, int64_t row) {
    const ready_t *r = work;
    const unsigned before = flush_denormals();
    const int64_t k = r->product->k, from = row * k;
    const V factor = v_set(r->norm ? norm_factor(r->x, from, k, r->bf16, r->eps) : 1.0f);
    for (int64_t step = 0; step < steps_of(r->product); step++) {
        float values[STEP];
        for (int half = 0; half < STEP; half += 16) {
            const int64_t at = step * STEP + half;
            V x = v_zero();
            if (at < k) {
                x = load_some(r->x, from + at, k - at, r->bf16);
                if (r->norm) x = v_mul(v_mul(x, factor), load_some(r->norm, at, k - at, 0));
            }
            if (r->bf16) { /* lanes and tiles are given the same numbers */
                uint16_t rounded[16];
                v_store_bf16(rounded, x);
                x = v_load_bf16(rounded);
            }
            v_store(values + half, x);
        }
        if (in_whole_numbers(r->product))
            round_step(values, r, row, step);
        else if (r->tiles)
            for (int half = 0; half < STEP; half += 16) v_store_bf16(r->tiles + row * r->stride + step * STEP + half, v_load(values + half));
        else
            memcpy(r->fp32 + row * r->stride + step * STEP, values, sizeof values);
    }
    _mm_setcsr(before);
}

static size_t input_bytes(const product_t *p, int64_t rows) {
    const int64_t steps = steps_of(p);
    return (size_t)(rows * (in_whole_numbers(p) ? steps * (STEP * 5 + 8) : lane_stride(p) * 4) + 5 * 64);
}

/* Carved from the arena. */
static input_t make_ready(const product_t *p, const void *x, int64_t rows, int bf16, const float *norm, float eps, int threads) {
    const int64_t steps = steps_of(p), numbers = rows * steps * STEP;
    const int tiles = by_tiles(p, rows, bf16);
    ready_t ready = {.product = p, .x = x, .bf16 = bf16, .norm = norm, .eps = eps, .stride = tiles ? steps * STEP : lane_stride(p)};
    if (in_whole_numbers(p)) {
        ready.dots = (dot_rows_t){carve(&arena, (size_t)numbers), NULL, carve(&arena, (size_t)(rows * steps * 4)),
                                  carve(&arena, (size_t)(rows * steps * 4)), steps};
        if (!tiles && p->kind == INT8 && dots->takes_words) ready.dots.words = carve(&arena, (size_t)numbers * 2);
        if (tiles) ready.tiles = carve(&arena, (size_t)numbers * 2);
    } else if (tiles) {
        if (!norm && p->k == steps * STEP) return (input_t){.rows = rows, .bf16 = x, .stride = steps * STEP};
        ready.tiles = carve(&arena, (size_t)numbers * 2);
    } else {
        ready.fp32 = carve(&arena, (size_t)(rows * ready.stride * 4));
    }
    pool_run(ready_row, &ready, rows, rows >= 16 ? threads : 1);
    return (input_t){rows, ready.fp32, ready.stride, ready.tiles, ready.dots};
}
