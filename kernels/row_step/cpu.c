/* What a decoder layer does for a few new tokens of some rows, in fp32; weights may have 8 bits.
 *
 * Vectors of eight floats in GCC's and Clang's portable notation: the compiler makes AVX, SSE or NEON of them. OpenMP's
 * symbols are left open and found in the runtime that torch has loaded, so that both use one pool of threads.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 8
/* queries that read a key together: four of them and two keys fill one vector with scores */
#define QUERIES 4
#define MAX_HEAD 256
/* below so many floats, waking other threads takes longer than the work */
#define WORTH_THREADS 8192

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

static inline vec all(float x) { return (vec){x, x, x, x, x, x, x, x}; }
static inline vec load(const float *p) { return *(const vec *)p; }
static inline void store(float *p, vec x) { *(vec *)p = x; }
static inline vec choose(ivec mask, vec yes, vec no) { return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask)); }
static inline vec larger(vec a, vec b) { return choose(a > b, a, b); }

static inline float sum_of(vec x) {
    x += SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
    x += SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
    return x[0] + x[1];
}

/* e^x for x <= 0, to two units in the last place; Cephes' polynomial. What is below e^-87 counts as that. */
static inline vec exp_of(vec x) {
    x = larger(x, all(-87.0f));
    /* adding 1.5 * 2^23 rounds to the nearest integer */
    const vec shifted = x * all(1.44269504088896341f) + all(12582912.0f);
    const vec n = shifted - all(12582912.0f);
    const vec r = x - n * all(0.693359375f) + n * all(2.12194440e-4f);
    vec p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    p = p * r * r + r + all(1.0f);
    const ivec exponent = (ivec)shifted - (ivec)all(12582912.0f);
    return p * (vec)((exponent + 127) << 23);
}

/* lane i of the result: the sum over all lanes of a[i] */
static inline vec sums_of(const vec *a) {
    vec t[4], u[2];
    for (int i = 0; i < 4; i++)
        t[i] = SHUFFLE(a[2 * i], a[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
               SHUFFLE(a[2 * i], a[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    for (int i = 0; i < 2; i++)
        u[i] = SHUFFLE(t[2 * i], t[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               SHUFFLE(t[2 * i], t[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return SHUFFLE(u[0], u[1], 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(u[0], u[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

/* x += delta (unless NULL), out = RMSNorm(x) * weight; x, delta, out [tokens, width] */
void add_norm(int threads, int64_t tokens, int64_t width, float *x, const float *delta, const float *weight, float eps,
              float *out) {
#pragma omp parallel for num_threads(threads) if (tokens * width > WORTH_THREADS)
    for (int64_t t = 0; t < tokens; t++) {
        float *row = x + t * width, *to = out + t * width;
        vec squares = all(0);
        float rest = 0;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) {
            vec value = load(row + i);
            if (delta) store(row + i, value += load(delta + t * width + i));
            squares += value * value;
        }
        for (; i < width; i++) {
            if (delta) row[i] += delta[t * width + i];
            rest += row[i] * row[i];
        }
        const float scale = 1.0f / sqrtf((sum_of(squares) + rest) / (float)width + eps);
        for (i = 0; i + LANES <= width; i += LANES) store(to + i, load(row + i) * all(scale) * load(weight + i));
        for (; i < width; i++) to[i] = row[i] * scale * weight[i];
    }
}

/* out = SiLU(gate) * up; gate, up [tokens, width], `stride` floats from a token to the next; out without gaps */
void silu_mul(int threads, int64_t tokens, int64_t width, int64_t stride, const float *gate, const float *up,
              float *out) {
#pragma omp parallel for num_threads(threads) if (tokens * width > WORTH_THREADS)
    for (int64_t t = 0; t < tokens; t++) {
        const float *g = gate + t * stride, *u = up + t * stride;
        float *to = out + t * width;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) {
            const vec x = load(g + i);
            const ivec positive = x > all(0);
            const vec e = exp_of(choose(positive, -x, x));
            store(to + i, x * choose(positive, all(1), e) / (all(1) + e) * load(u + i));
        }
        for (; i < width; i++) to[i] = g[i] / (1.0f + expf(-g[i])) * u[i];
    }
}

/* outputs whose weights lie together */
#define PANEL (2 * LANES)
/* tokens whose sums with a panel fill twelve of sixteen registers */
#define MAX_TOKENS 6
/* inputs of a panel that are multiplied before the next tokens come: they stay in the first or second cache */
#define MAX_INPUTS 576
/* Bytes ahead of the product that weights are asked for. With few tokens the first cache has the time to wait for memory;
 * with more, what waits there stands in the way of the inputs, and the second cache is asked to have them. */
#define AHEAD 4096
#define FAR_AHEAD 8192
#define FEW_TOKENS 2

/* 8-bit weights of four inputs that follow one another lie in one integer, so that shifts take them apart */
#define PACKED 4

/* weight i of `size` bytes of the eight outputs that begin at `panel` */
static inline __attribute__((always_inline)) vec weights_of(const void *panel, int64_t i, const int size) {
    if (size == sizeof(float)) return load((const float *)panel + i * PANEL);
    const ivec four = *(const ivec *)((const int32_t *)panel + i / PACKED * PANEL);
    return __builtin_convertvector(four << (24 - 8 * (i % PACKED)) >> 24, vec);
}

/* where weights are asked for while others are multiplied: nowhere, AHEAD of these, or in the part of a panel behind this */
enum { NOTHING, THESE, NEXT };

/* out (+)= x panel for `tokens` tokens, with weights of `size` bytes; constants where this is inlined, as is `asked`. */
static inline __attribute__((always_inline)) void products(const int tokens, const int size, const int asked, int is_first,
                                                           int64_t inputs, const float *x, int64_t x_stride,
                                                           const char *panel, float *out, int64_t out_stride) {
    const int together = size == sizeof(float) ? 1 : PACKED;
    /* sums that go side by side, where few tokens would leave one waiting for itself */
    const int ways = size == sizeof(float) || tokens > FEW_TOKENS ? 1 : 2;
    const char *next = panel + inputs * PANEL * size;
    /* not of `tokens`: an array whose size is no constant expression lives in memory */
    vec sums[MAX_TOKENS * 2][2];
    for (int t = 0; t < tokens; t++)
        for (int half = 0; half < 2; half++) {
            sums[t][half] = is_first ? all(0) : load(out + t * out_stride + half * LANES);
            if (ways == 2) sums[MAX_TOKENS + t][half] = all(0);
        }
    for (int64_t i = 0; i < inputs; i += together) {
        const char *here = panel + i * PANEL * size;
        if (asked == THESE && tokens <= FEW_TOKENS) __builtin_prefetch(here + AHEAD, 0, 3);
        if (asked == THESE && tokens > FEW_TOKENS) __builtin_prefetch(here + FAR_AHEAD, 0, 2);
        if (asked == NEXT) __builtin_prefetch(next + i * PANEL * size, 0, 2);
        for (int k = 0; k < together; k++) {
            const vec low = weights_of(here, k, size), high = weights_of(here + LANES * sizeof(float), k, size);
            for (int t = 0; t < tokens; t++) {
                const vec value = all(x[t * x_stride + i + k]);
                vec *sum = sums[k % ways * MAX_TOKENS + t];
                sum[0] += low * value;
                sum[1] += high * value;
            }
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int half = 0; half < 2; half++) {
            if (ways == 2) sums[t][half] += sums[MAX_TOKENS + t][half];
            store(out + t * out_stride + half * LANES, sums[t][half]);
        }
}

#define PRODUCTS(n)                                                                                             \
    do {                                                                                                        \
        if (asked == THESE) products(n, size, THESE, is_first, inputs, x, x_stride, panel, out, width);         \
        else if (asked == NEXT) products(n, size, NEXT, is_first, inputs, x, x_stride, panel, out, width);      \
        else products(n, size, NOTHING, is_first, inputs, x, x_stride, panel, out, width);                      \
    } while (0)

static inline __attribute__((always_inline)) void products_of(int64_t tokens, const int size, int asked, int is_first,
                                                              int64_t inputs, const float *x, int64_t x_stride,
                                                              const char *panel, float *out, int64_t width) {
    switch (tokens) {
    case 1: PRODUCTS(1); break;
    case 2: PRODUCTS(2); break;
    case 3: PRODUCTS(3); break;
    case 4: PRODUCTS(4); break;
    case 5: PRODUCTS(5); break;
    default: PRODUCTS(6);
    }
}

/* What one panel makes of all tokens. While the second six tokens are multiplied, memory brings what follows. */
static inline __attribute__((always_inline)) void panel_of(const int size, int64_t tokens, int64_t inputs, const float *x,
                                                           int64_t x_stride, const char *panel, float *out,
                                                           int64_t width) {
    const int64_t parts = (inputs + MAX_INPUTS - 1) / MAX_INPUTS;
    const int64_t part = ((inputs + parts - 1) / parts + PACKED - 1) / PACKED * PACKED;
    for (int64_t i = 0; i < inputs; i += part)
        for (int64_t t = 0; t < tokens;) {
            /* parts of about one size */
            const int64_t left = tokens - t;
            const int64_t count = left <= MAX_TOKENS ? left : left <= 8 ? 4 : left <= 10 ? 5 : MAX_TOKENS;
            products_of(count, size, t == 0 ? THESE : t <= MAX_TOKENS ? NEXT : NOTHING, i == 0,
                        part < inputs - i ? part : inputs - i, x + t * x_stride + i, x_stride, panel + i * PANEL * size,
                        out + t * width, width);
            t += count;
        }
}

/* A matrix with which inputs are multiplied, in panels: fp32 [num_panels, inputs, PANEL], or with `scales`
 * [num_panels * PANEL] bytes [num_panels, inputs / PACKED, PANEL, PACKED] and inputs that are a multiple of PACKED. */
typedef struct {
    const void *panels;
    const float *scales;
    int64_t inputs;
    int64_t num_panels;
} Weight;

/* out = x weight: x [tokens, inputs], out [tokens, num_panels * PANEL], *_stride floats from a token to the next */
void linear(int threads, int64_t tokens, const Weight *weight, const float *x, int64_t x_stride, float *out,
            int64_t out_stride) {
    const float *scales = weight->scales;
    const int64_t inputs = weight->inputs, size = scales ? 1 : sizeof(float);
#pragma omp parallel for num_threads(threads) schedule(static) if (inputs * weight->num_panels * PANEL > WORTH_THREADS)
    for (int64_t p = 0; p < weight->num_panels; p++) {
        const char *panel = (const char *)weight->panels + p * inputs * PANEL * size;
        float *to = out + p * PANEL;
        if (!scales) {
            panel_of(sizeof(float), tokens, inputs, x, x_stride, panel, to, out_stride);
            continue;
        }
        panel_of(1, tokens, inputs, x, x_stride, panel, to, out_stride);
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t half = 0; half < PANEL; half += LANES)
                store(to + t * out_stride + half, load(to + t * out_stride + half) * load(scales + p * PANEL + half));
    }
}

static inline void rotate(const float *x, const float *cosine, const float *sine, int64_t size, float *out) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        const vec low = load(x + i), high = load(x + half + i);
        store(out + i, low * load(cosine + i) + high * load(sine + i));
        store(out + half + i, high * load(cosine + half + i) + low * load(sine + half + i));
    }
}

/* One block of queries over the keys that they may see: the first sees[q] and own[q]. Their results go where the queries
 * were. */
static void attend_block(float *const *where, const int64_t *sees, const int64_t *own, int count, int64_t size,
                         float scale, const float *keys, const float *values, float *scores) {
    float q[QUERIES][MAX_HEAD];
    int64_t most = 0, least = INT64_MAX;
    for (int i = 0; i < QUERIES; i++) {
        /* a short block repeats its last query: scores of nobody cost nothing that matters */
        const int from = i < count ? i : count - 1;
        for (int64_t d = 0; d < size; d += LANES) store(q[i] + d, load(where[from] + d) * all(scale));
        most = own[from] + 1 > most ? own[from] + 1 : most;
        least = sees[from] < least ? sees[from] : least;
    }
    vec best = all(-INFINITY);
    for (int64_t j = 0; j < most; j += 2) {
        const float *first = keys + j * size, *second = keys + (j + 1 < most ? j + 1 : j) * size;
        vec sums[2 * QUERIES] = {all(0), all(0), all(0), all(0), all(0), all(0), all(0), all(0)};
        for (int64_t d = 0; d < size; d += LANES) {
            const vec a = load(first + d), b = load(second + d);
            for (int i = 0; i < QUERIES; i++) {
                const vec x = load(q[i] + d);
                sums[i] += a * x;
                sums[QUERIES + i] += b * x;
            }
        }
        vec score = sums_of(sums);
        if (j + 1 >= least)
            for (int i = 0; i < 2 * QUERIES; i++) {
                const int query = i % QUERIES < count ? i % QUERIES : count - 1;
                const int64_t key = j + i / QUERIES;
                if (key >= sees[query] && key != own[query]) score[i] = -INFINITY;
            }
        store(scores + j * QUERIES, score);
        best = larger(best, score);
    }
    best = larger(best, SHUFFLE(best, best, 4, 5, 6, 7, 0, 1, 2, 3));
    vec total = all(0);
    for (int64_t j = 0; j < most; j += 2) {
        const vec weight = exp_of(load(scores + j * QUERIES) - best);
        store(scores + j * QUERIES, weight);
        total += weight;
    }
    total += SHUFFLE(total, total, 4, 5, 6, 7, 0, 1, 2, 3);
    for (int64_t d = 0; d < size; d += 2 * LANES) {
        vec sums[QUERIES][2] = {{all(0), all(0)}, {all(0), all(0)}, {all(0), all(0)}, {all(0), all(0)}};
        for (int64_t j = 0; j < most; j++) {
            const vec a = load(values + j * size + d), b = load(values + j * size + d + LANES);
            for (int i = 0; i < QUERIES; i++) {
                const vec weight = all(scores[j * QUERIES + i]);
                sums[i][0] += weight * a;
                sums[i][1] += weight * b;
            }
        }
        for (int i = 0; i < count; i++) {
            store(where[i] + d, sums[i][0] / all(total[i]));
            store(where[i] + d + LANES, sums[i][1] / all(total[i]));
        }
    }
}

typedef struct {
    int64_t slot;     /* where the row lies in the stores */
    int64_t start;    /* keys it holds already */
    int64_t position; /* of its first new token */
    int64_t first;    /* its first new token */
    int64_t count;    /* its new tokens, one behind the other */
} Row;

/* Rotate queries and keys, put keys and values behind their rows' own, and attend.
 *
 * q [tokens, heads * size], k and v [tokens, kv_heads * size], *_stride floats from a token to the next; cosine and
 * (signed) sine [positions, size]; stores [slots, kv_heads, capacity, size]; out [tokens, heads * size]. With `depths`
 * [tokens], a token stands that far behind its row's first new one, and sees as many of the new tokens besides itself;
 * NULL: each stands behind all new ones before it.
 * Returns 0, or 1 where there is no memory for scores.
 */
int attend(int threads, const Row *rows, int64_t num_rows, const int64_t *depths, int64_t heads, int64_t kv_heads,
           int64_t size, float scale,
           const float *q, int64_t q_stride, const float *k, int64_t k_stride, const float *v, int64_t v_stride,
           const float *cosine, const float *sine, float *keys, float *values, int64_t capacity, float *out) {
    const int64_t group = heads / kv_heads, slot_size = kv_heads * capacity * size;
    int64_t longest = 0, work = 0;
    for (int64_t r = 0; r < num_rows; r++) {
        const int64_t end = rows[r].start + rows[r].count;
        longest = end > longest ? end : longest;
        work += rows[r].count * end * size * heads;
    }
    const int64_t room = (longest + 2) * QUERIES;
    float *scratch = malloc((size_t)(threads * room) * sizeof(float));
    if (!scratch) return 1;
    int64_t next = 0;
#pragma omp parallel num_threads(threads) if (work > 4 * WORTH_THREADS)
    {
        float *scores;
        int64_t mine;
#pragma omp atomic capture
        mine = next++;
        scores = scratch + mine * room;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < num_rows; r++)
            for (int64_t i = 0; i < rows[r].count; i++) {
                const int64_t token = rows[r].first + i, depth = depths ? depths[token] : i;
                const int64_t at = (rows[r].position + depth) * size;
                for (int64_t h = 0; h < heads; h++)
                    rotate(q + token * q_stride + h * size, cosine + at, sine + at, size, out + (token * heads + h) * size);
                for (int64_t h = 0; h < kv_heads; h++) {
                    const int64_t to = rows[r].slot * slot_size + (h * capacity + rows[r].start + i) * size;
                    rotate(k + token * k_stride + h * size, cosine + at, sine + at, size, keys + to);
                    memcpy(values + to, v + token * v_stride + h * size, (size_t)size * sizeof(float));
                }
            }
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < num_rows * kv_heads; item++) {
            const Row *row = rows + item / kv_heads;
            const int64_t h = item % kv_heads, from = row->slot * slot_size + h * capacity * size;
            for (int64_t begin = 0; begin < row->count * group; begin += QUERIES) {
                float *where[QUERIES];
                int64_t sees[QUERIES], own[QUERIES];
                int count = 0;
                for (int64_t i = begin; i < row->count * group && count < QUERIES; i++, count++) {
                    /* token by token, a group's heads next to each other */
                    where[count] = out + ((row->first + i / group) * heads + h * group + i % group) * size;
                    own[count] = row->start + i / group;
                    sees[count] = depths ? row->start + depths[row->first + i / group] : own[count];
                }
                attend_block(where, sees, own, count, size, scale, keys + from, values + from, scores);
            }
        }
    }
    free(scratch);
    return 0;
}

/* A decoder layer: the weights of its norms, its products, and where its rows' keys and values lie. Products that are
 * joined are the first of theirs; the others have no panels then. */
typedef struct {
    const float *before_attention;
    const float *before_mlp;
    Weight qkv[3];
    Weight out;
    Weight gate_up[2];
    Weight down;
    float *keys;
    float *values;
} Layer;

/* products of one input, side by side in `out` */
static void products_side_by_side(int threads, int64_t tokens, const Weight *weights, int count, const float *x,
                                  int64_t x_stride, float *out, int64_t out_stride) {
    for (int i = 0; i < count; i++) {
        if (!weights[i].panels) continue;
        linear(threads, tokens, weights + i, x, x_stride, out, out_stride);
        out += weights[i].num_panels * PANEL;
    }
}

/* All decoder layers: x [tokens, hidden] in, and out as it is before the last norm.
 *
 * Rows, tables and stores as `attend` has them. Returns 0, or 1 where there is no memory for what lies in between.
 */
int layers(int threads, const Layer *layers, int64_t num_layers, const Row *rows, int64_t num_rows,
           const int64_t *depths, int64_t tokens,
           int64_t hidden, int64_t heads, int64_t kv_heads, int64_t size, int64_t inner, float eps, float scale,
           const float *cosine, const float *sine, int64_t capacity, float *x) {
    const int64_t queries = heads * size, keys = kv_heads * size, width = queries + 2 * keys;
    float *normed = malloc((size_t)(tokens * (2 * hidden + width + queries + 3 * inner)) * sizeof(float));
    if (!normed) return 1;
    float *delta = normed + tokens * hidden, *qkv = delta + tokens * hidden, *attended = qkv + tokens * width;
    float *gate_up = attended + tokens * queries, *gated = gate_up + 2 * tokens * inner;
    int failed = 0;
    for (int64_t l = 0; l < num_layers && !failed; l++) {
        const Layer *layer = layers + l;
        add_norm(threads, tokens, hidden, x, l ? delta : NULL, layer->before_attention, eps, normed);
        products_side_by_side(threads, tokens, layer->qkv, 3, normed, hidden, qkv, width);
        failed = attend(threads, rows, num_rows, depths, heads, kv_heads, size, scale, qkv, width, qkv + queries, width,
                        qkv + queries + keys, width, cosine, sine, layer->keys, layer->values, capacity, attended);
        linear(threads, tokens, &layer->out, attended, queries, delta, hidden);
        add_norm(threads, tokens, hidden, x, delta, layer->before_mlp, eps, normed);
        products_side_by_side(threads, tokens, layer->gate_up, 2, normed, hidden, gate_up, 2 * inner);
        silu_mul(threads, tokens, inner, 2 * inner, gate_up, gate_up + inner, gated);
        linear(threads, tokens, &layer->down, gated, inner, delta, hidden);
    }
    for (int64_t i = 0; i < tokens * hidden; i++) x[i] += delta[i];
    free(normed);
    return failed;
}
