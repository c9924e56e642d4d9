// What would be several passes over memory in torch, in one. Compiled once per machine and precision by kernels.py,
// with BFLOAT16 defined or not; all arithmetic is float32, only what lies in memory is T. Tensors are dense, rows of the
// last dimension; each function's arguments are described by its caller in kernels.py.

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(BFLOAT16) && defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#ifdef BFLOAT16
typedef uint16_t T;

static inline float get(T x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline T put(float value) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (T)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#else
typedef float T;

static inline float get(T x) { return x; }

static inline T put(float value) { return value; }
#endif

typedef int64_t Int;

#define BLOCK 4096 // entries that a thread takes at a time

static inline float least(float x, float y) { return x < y ? x : y; }

static inline float most(float x, float y) { return x > y ? x : y; }

// exp, to float32's precision: exp(x) = 2^n exp(r) with |r| <= ln(2) / 2, and a Taylor polynomial for exp(r).
static inline float exponential(float x) {
    x = most(least(x, 88.0f), -87.0f);
    float n = __builtin_rintf(x * 1.44269504f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// --- norms

void rms_norm(const T *x, const T *weight, T *out, float *inverse, Int rows, Int width, float eps) {
#pragma omp parallel for schedule(static)
    for (Int row = 0; row < rows; row++) {
        const T *from = x + row * width;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (Int i = 0; i < width; i++) squares += get(from[i]) * get(from[i]);
        float factor = 1.0f / sqrtf(squares / width + eps);
        inverse[row] = factor;
#pragma omp simd
        for (Int i = 0; i < width; i++) out[row * width + i] = put(get(put(get(from[i]) * factor)) * get(weight[i]));
    }
}

// From the norm's result, which the next layer keeps anyway, and not from x.
void rms_norm_backward(const T *grad, const T *result, const T *weight, const float *inverse, T *out, Int rows,
                       Int width) {
#pragma omp parallel for schedule(static)
    for (Int row = 0; row < rows; row++) {
        const T *g = grad + row * width, *from = result + row * width;
        float along = 0, factor = inverse[row];
#pragma omp simd reduction(+ : along)
        for (Int i = 0; i < width; i++) along += get(g[i]) * get(from[i]);
        along /= width;
#pragma omp simd
        for (Int i = 0; i < width; i++) {
            float w = get(weight[i]);
            out[row * width + i] = put(factor * (get(g[i]) * w - get(from[i]) / w * along));
        }
    }
}

// --- entry by entry

#define EACH(count)                                                                                                    \
    _Pragma("omp parallel for schedule(static)") for (Int first = 0; first < (count); first += BLOCK)                  \
        _Pragma("omp simd") for (Int i = first; i < (first + BLOCK < (count) ? first + BLOCK : (count)); i++)

void silu_gate(const T *gate, const T *up, T *out, Int count) {
    EACH(count) {
        float x = get(gate[i]);
        out[i] = put(get(put(x * sigmoid(x))) * get(up[i]));
    }
}

void silu_gate_backward(const T *grad, const T *gate, const T *up, T *d_gate, T *d_up, Int count) {
    EACH(count) {
        float x = get(gate[i]), s = sigmoid(x), g = get(grad[i]);
        d_up[i] = put(g * x * s);
        d_gate[i] = put(g * get(up[i]) * (s + x * s * (1.0f - s)));
    }
}

// Whether entry i is kept: a hash of i, MurmurHash3's last mixing step with a seed before and within it, against p.
static inline int kept(uint32_t i, uint64_t seed, uint32_t threshold) {
    uint32_t h = i + (uint32_t)seed;
    h ^= h >> 16;
    h *= 0x85ebca6b;
    h ^= (uint32_t)(seed >> 32);
    h ^= h >> 13;
    h *= 0xc2b2ae35;
    return (h ^ (h >> 16)) >= threshold;
}

void drop(const T *x, T *out, Int count, uint64_t seed, uint32_t threshold, float scale) {
    if (scale == 1.0f)
        EACH(count) out[i] = kept((uint32_t)i, seed, threshold) ? x[i] : 0;
    else
        EACH(count) out[i] = kept((uint32_t)i, seed, threshold) ? put(get(x[i]) * scale) : 0;
}

void add_dropped(T *out, const T *x, Int count, uint64_t seed, uint32_t threshold) {
    EACH(count) out[i] = kept((uint32_t)i, seed, threshold) ? put(get(out[i]) + get(x[i])) : out[i];
}

// --- rotary positions: two halves of each head, turned against each other

void rotate(const T *x, const T *cos, const T *sin, T *out, Int tokens, Int heads, Int width, int back) {
    Int half = width / 2;
#pragma omp parallel for schedule(static)
    for (Int token = 0; token < tokens; token++) {
        const T *c = cos + token * width, *s = sin + token * width;
        for (Int head = 0; head < heads; head++) {
            const T *a = x + (token * heads + head) * width, *b = a + half;
            T *to = out + (token * heads + head) * width;
            if (back) {
#pragma omp simd
                for (Int i = 0; i < half; i++) {
                    to[i] = put(get(a[i]) * get(c[i]) + get(b[i]) * get(s[half + i]));
                    to[half + i] = put(get(b[i]) * get(c[half + i]) - get(a[i]) * get(s[i]));
                }
            } else {
#pragma omp simd
                for (Int i = 0; i < half; i++) {
                    to[i] = put(get(a[i]) * get(c[i]) - get(b[i]) * get(s[i]));
                    to[half + i] = put(get(b[i]) * get(c[half + i]) + get(a[i]) * get(s[half + i]));
                }
            }
        }
    }
}

// --- attention of padded segments: softmax over what a row may see, and its gradient, in place

void softmax(T *scores, const Int *lengths, Int segments, Int heads, Int rows, Int columns, Int prefix, Int start,
             Int window) {
#pragma omp parallel for schedule(static)
    for (Int line = 0; line < segments * heads * rows; line++) {
        T *values = scores + line * columns;
        Int own = start + line % rows, last = prefix + own + 1;
        if (own >= lengths[line / rows / heads]) last = 0;  // padding sees nothing
        Int first = window && last > window ? last - window : 0;
        float largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
        for (Int i = first; i < last; i++) largest = most(largest, get(values[i]));
        memset(values, 0, first * sizeof(T));
        memset(values + last, 0, (columns - last) * sizeof(T));
#pragma omp simd reduction(+ : sum)
        for (Int i = first; i < last; i++) sum += exponential(get(values[i]) - largest);
        float factor = 1.0f / sum;
#pragma omp simd
        for (Int i = first; i < last; i++) values[i] = put(exponential(get(values[i]) - largest) * factor);
    }
}

void softmax_backward(T *grad, const T *probabilities, Int rows, Int columns) {
#pragma omp parallel for schedule(static)
    for (Int row = 0; row < rows; row++) {
        T *g = grad + row * columns;
        const T *p = probabilities + row * columns;
        float mean = 0;
#pragma omp simd reduction(+ : mean)
        for (Int i = 0; i < columns; i++) mean += get(g[i]) * get(p[i]);
#pragma omp simd
        for (Int i = 0; i < columns; i++) g[i] = put(get(p[i]) * (get(g[i]) - mean));
    }
}

// --- cross-entropy: logits become their gradient

void cross_entropy(T *logits, const Int *targets, float *losses, Int rows, Int words) {
#pragma omp parallel for schedule(static)
    for (Int row = 0; row < rows; row++) {
        T *values = logits + row * words;
        float at_target = get(values[targets[row]]), largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
        for (Int i = 0; i < words; i++) largest = most(largest, get(values[i]));
#pragma omp simd reduction(+ : sum)
        for (Int i = 0; i < words; i++) sum += exponential(get(values[i]) - largest);
        float factor = 1.0f / sum, missing = exponential(at_target - largest) * factor - 1.0f;
#pragma omp simd
        for (Int i = 0; i < words; i++) values[i] = put(exponential(get(values[i]) - largest) * factor);
        values[targets[row]] = put(missing);
        losses[row] = logf(sum) + largest - at_target;
    }
}

// --- generation

void store(const T *from, T *cache, const Int *pages, const Int *columns, Int page, Int tokens, Int heads, Int width) {
#pragma omp parallel for schedule(static)
    for (Int token = 0; token < tokens; token++)
        for (Int head = 0; head < heads; head++)
            memcpy(cache + ((pages[token] * heads + head) * page + columns[token]) * width,
                   from + (token * heads + head) * width, width * sizeof(T));
}

typedef float Lanes __attribute__((vector_size(64)));

// 32 neighbours: in bfloat16 those with even numbers and those with odd ones, as that takes one instruction each.
static inline void load(const T *from, Lanes *first, Lanes *second) {
#ifdef BFLOAT16
    typedef uint32_t Pairs __attribute__((vector_size(64)));
    Pairs pairs;
    memcpy(&pairs, from, 64);
    *first = (Lanes)(pairs << 16);
    *second = (Lanes)(pairs & 0xffff0000);
#else
    memcpy(first, from, 64);
    memcpy(second, from + 16, 64);
#endif
}

// Where entry i of a row is after `load`.
static inline Int place(Int i, Int width) {
#ifdef BFLOAT16
    if (width == 64 || width == 96 || width == 128) return i / 32 * 32 + i % 2 * 16 + i % 32 / 2;
#endif
    (void)width;
    return i;
}

static inline float total(Lanes values) {
    typedef float Half __attribute__((vector_size(32)));
    typedef float Quarter __attribute__((vector_size(16)));
    Half halves[2];
    Quarter quarters[2];
    memcpy(halves, &values, 64);
    halves[0] += halves[1];
    memcpy(quarters, halves, 32);
    quarters[0] += quarters[1];
    return (quarters[0][0] + quarters[0][1]) + (quarters[0][2] + quarters[0][3]);
}

// Pages lie anywhere: the processor does not guess which one is next.
static void fetch(const T *from, Int count) {
    for (Int i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i);
}

// scores[row][token] = queries[row] . keys[token]; a row of scores has `page` places.
static inline __attribute__((always_inline)) void products(const float *queries, const T *keys, const T *values,
                                                           const T *next, float *scores, Int rows, Int tokens,
                                                           Int page, Int width) {
    for (Int token = 0; token < tokens; token++) {
        fetch(values + token * width, width);
        if (next) fetch(next + token * width, width);
        const T *key = keys + token * width;
        Lanes parts[8];
#pragma GCC unroll 4
        for (Int i = 0; i < width / 16; i += 2) load(key + 16 * i, parts + i, parts + i + 1);
        for (Int row = 0; row < rows; row++) {
            Lanes sum = {0};
#pragma GCC unroll 8
            for (Int i = 0; i < width / 16; i++) {
                Lanes query;
                memcpy(&query, queries + row * width + 16 * i, 64);
                sum += query * parts[i];
            }
            scores[row * page + token] = total(sum);
        }
    }
}

// found[row] += sum of weights[row][token] * values[token]
static inline __attribute__((always_inline)) void weighted(const float *weights, const T *values, float *found,
                                                           Int rows, Int tokens, Int page, Int width) {
    for (Int row = 0; row < rows; row++) {
        Lanes sums[8];
        memcpy(sums, found + row * width, width * sizeof(float));
        for (Int token = 0; token < tokens; token++)
#pragma GCC unroll 4
            for (Int i = 0; i < width / 16; i += 2) {
                Lanes first, second;
                load(values + token * width + 16 * i, &first, &second);
                sums[i] += weights[row * page + token] * first;
                sums[i + 1] += weights[row * page + token] * second;
            }
        memcpy(found + row * width, sums, width * sizeof(float));
    }
}

// The same for widths that are no constant here.
static void any_products(const float *queries, const T *keys, const T *values, const T *next, float *scores,
                         Int rows, Int tokens, Int page, Int width) {
    fetch(values, tokens * width);
    if (next) fetch(next, tokens * width);
    for (Int row = 0; row < rows; row++)
        for (Int token = 0; token < tokens; token++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (Int i = 0; i < width; i++) sum += queries[row * width + i] * get(keys[token * width + i]);
            scores[row * page + token] = sum;
        }
}

static void any_weighted(const float *weights, const T *values, float *found, Int rows, Int tokens, Int page,
                         Int width) {
    for (Int row = 0; row < rows; row++)
        for (Int token = 0; token < tokens; token++)
#pragma omp simd
            for (Int i = 0; i < width; i++)
                found[row * width + i] += weights[row * page + token] * get(values[token * width + i]);
}

// Scores become exponentials, and what their row has so far is scaled to the same largest score.
static void exponentials(float *scores, Int tokens, Int width, float *largest, float *sum, float *found) {
    float before = *largest, now = before, more = 0;
#pragma omp simd reduction(max : now)
    for (Int token = 0; token < tokens; token++) now = most(now, scores[token]);
    float against = now == -INFINITY ? 0.0f : now;  // a row that sees nothing yet
#pragma omp simd reduction(+ : more)
    for (Int token = 0; token < tokens; token++) {
        scores[token] = scores[token] == -INFINITY ? 0.0f : exponential(scores[token] - against);
        more += scores[token];
    }
    *largest = now;
    if (now > before) {
        float factor = before == -INFINITY ? 0.0f : exponential(before - now);
        *sum *= factor;
        for (Int i = 0; i < width; i++) found[i] *= factor;
    }
    *sum += more;
}

#define FOR_WIDTH(name, ...)                                                                                           \
    switch (width) {                                                                                                   \
    case 64: name(__VA_ARGS__, 64); break;                                                                             \
    case 96: name(__VA_ARGS__, 96); break;                                                                             \
    case 128: name(__VA_ARGS__, 128); break;                                                                           \
    default: any_##name(__VA_ARGS__, width);                                                                           \
    }

void decode(const T *query, const T *keys, const T *values, const T *prefix_keys, const T *prefix_values,
            const Int *adapters, const Int *table, const Int *slots, const Int *at, T *out, Int count, Int beside,
            Int heads, Int groups, Int width, Int page, Int prefix, Int most_pages, float scale, Int window) {
    Int each = heads / groups, rows = beside * each;
#pragma omp parallel for schedule(dynamic)
    for (Int task = 0; task < count * groups; task++) {
        Int who = task / groups, group = task % groups;
        const Int *positions = at + who * beside;
        float queries[rows * width], found[rows * width], scores[rows * page], largest[rows], sums[rows];
        Int end = prefix;
        for (Int row = 0; row < rows; row++) {
            Int token = who * beside + row / each;
            const T *from = query + (token * heads + group * each + row % each) * width;
            for (Int i = 0; i < width; i++) {
                queries[row * width + place(i, width)] = get(from[i]) * scale;
                found[row * width + i] = 0;
            }
            largest[row] = -INFINITY, sums[row] = 0;
            if (slots[who] >= 0 && positions[row / each] >= end) end = positions[row / each] + 1;
        }
        for (Int first = 0; first < end;) {
            const T *key, *value;
            Int tokens;
            if (first < prefix) {
                tokens = prefix - first;
                Int at_prefix = ((adapters[who] * groups + group) * prefix + first) * width;
                key = prefix_keys + at_prefix, value = prefix_values + at_prefix;
            } else {
                Int number = table[slots[who] * most_pages + (first - prefix) / page];
                tokens = end - first;
                key = keys + (number * groups + group) * page * width;
                value = values + (number * groups + group) * page * width;
            }
            if (tokens > page) tokens = page;
            const T *next = NULL;
            if (first + tokens >= prefix && first + tokens < end) {
                Int number = table[slots[who] * most_pages + (first + tokens - prefix) / page];
                next = keys + (number * groups + group) * page * width;
            }
            FOR_WIDTH(products, queries, key, value, next, scores, rows, tokens, page);
            for (Int row = 0; row < rows; row++) {
                Int seen = positions[row / each] + 1 - first, hidden = window ? seen - window : 0;
                float *own = scores + row * page;
                for (Int token = seen < 0 ? 0 : seen; token < tokens; token++) own[token] = -INFINITY;
                for (Int token = 0; token < hidden && token < tokens; token++) own[token] = -INFINITY;
                exponentials(own, tokens, width, largest + row, sums + row, found + row * width);
            }
            FOR_WIDTH(weighted, scores, value, found, rows, tokens, page);
            first += tokens;
        }
        for (Int row = 0; row < rows; row++) {
            Int token = who * beside + row / each;
            T *to = out + (token * heads + group * each + row % each) * width;
            float factor = sums[row] > 0 ? 1.0f / sums[row] : 0.0f;
            for (Int i = 0; i < width; i++) to[i] = put(found[row * width + place(i, width)] * factor);
        }
    }
}

// --- LoRA, each row with its own adapter

#define ROWS 8 // at a time: a weight that is read is used for so many

// sums[block][row] += x[row] times two blocks of 16 columns of weights, which lie pair by pair of their rows:
// (blocks, pairs, 16, 2) in bfloat16, (blocks, pairs, 2, 16) in float32, as `load` wants them.
static inline __attribute__((always_inline)) void multiply(const T *const *x, const T *weights, Int pairs,
                                                           Lanes sums[2][ROWS]) {
    for (Int i = 0; i < pairs; i++)
#pragma GCC unroll 2
        for (Int block = 0; block < 2; block++) {
            const T *from = weights + (block * pairs + i) * 32;
#if defined(BFLOAT16) && defined(__AVX512BF16__)
            __m512bh columns;
            memcpy(&columns, from, 64);
#pragma GCC unroll 8
            for (Int row = 0; row < ROWS; row++) {
                int pair;
                memcpy(&pair, x[row] + 2 * i, 4);
                __m512 sum = _mm512_dpbf16_ps((__m512)sums[block][row], columns, (__m512bh)_mm512_set1_epi32(pair));
                sums[block][row] = (Lanes)sum;
            }
#else
            Lanes first, second;
            load(from, &first, &second);
#pragma GCC unroll 8
            for (Int row = 0; row < ROWS; row++)
                sums[block][row] += get(x[row][2 * i]) * first + get(x[row][2 * i + 1]) * second;
#endif
        }
}

// The first 16 entries, or as many as there are.
static inline Lanes widened(const T *from, Int count) {
    T some[16] = {0};
    if (count < 16) {
        for (Int i = 0; i < count; i++) some[i] = from[i];
        from = some;
    }
    float all[16];
#pragma omp simd
    for (Int i = 0; i < 16; i++) all[i] = get(from[i]);
    Lanes values;
    memcpy(&values, all, 64);
    return values;
}

static inline void narrowed(Lanes values, T *to, Int count) {
    float all[16];
    T some[16];
    memcpy(all, &values, 64);
#pragma omp simd
    for (Int i = 0; i < 16; i++) some[i] = put(all[i]);
    if (count >= 16) memcpy(to, some, sizeof some);
    else
        for (Int i = 0; i < count; i++) to[i] = some[i];
}

// A matrix with these steps between rows and columns, times `scale`, in the order in which `multiply` reads it, filled up
// with zeros to whole numbers of rows and columns.
void pair(const float *from, T *to, Int rows, Int columns, Int row_step, Int column_step, Int whole_rows,
          Int whole_columns, float scale) {
#pragma omp parallel for schedule(static)
    for (Int block = 0; block < whole_columns; block += 16)
        for (Int row = 0; row < whole_rows; row++)
            for (Int i = 0; i < 16; i++) {
                Int column = block + i;
#ifdef BFLOAT16
                Int place = (block * whole_rows / 2 + row / 2 * 16 + i) * 2 + row % 2;
#else
                Int place = block * whole_rows + row * 16 + i;
#endif
                int there = row < rows && column < columns;
                to[place] = put(there ? from[row * row_step + column * column_step] * scale : 0.0f);
            }
}

// What dropout does to the product: nothing, to what goes in (forward), to what is added in the end (backward).
enum { NOWHERE, BEFORE, AFTER };

// out += (x down) up, for no more than ROWS rows of one adapter; `in` is even, `rank` a multiple of 32; `first` is the
// number of the first row, which says what is dropped. What is between is written to `middle` too, if there is one.
static void some_rows(const T *x, const T *down, const T *up, T *out, T *middle, Int rows, Int in, Int rank, Int width,
                      Int first, uint64_t seed, uint32_t threshold, Int dropped) {
    T own[ROWS * rank], less[dropped == BEFORE ? ROWS * in : 1];
    const T *from[ROWS], *between[ROWS];
    for (Int row = 0; row < ROWS; row++) {  // those that are missing are computed and dropped
        from[row] = x + (row < rows ? row : 0) * in, between[row] = own + row * rank;
        if (dropped == BEFORE && row < rows) {
            uint32_t number = (uint32_t)((first + row) * in);
#pragma omp simd
            for (Int i = 0; i < in; i++)
                less[row * in + i] = kept(number + (uint32_t)i, seed, threshold) ? x[row * in + i] : 0;
        }
        if (dropped == BEFORE) from[row] = less + (row < rows ? row : 0) * in;
    }
    for (Int at = 0; at < rank; at += 32) {
        Lanes sums[2][ROWS] = {0};
        multiply(from, down + at * in, in / 2, sums);
        for (Int block = 0; block < 2; block++)
            for (Int row = 0; row < ROWS; row++) narrowed(sums[block][row], own + row * rank + at + 16 * block, 16);
    }
    if (middle) memcpy(middle, own, rows * rank * sizeof(T));
    for (Int at = 0; at < width; at += 32) {
        Lanes sums[2][ROWS] = {0};
        for (Int block = 0; block < 2; block++)
            for (Int row = 0; row < rows && dropped != AFTER; row++)
                sums[block][row] = widened(out + row * width + at + 16 * block, width - at - 16 * block);
        multiply(between, up + at * rank, rank / 2, sums);
        for (Int block = 0; block < 2; block++)
            for (Int row = 0; row < rows; row++) {
                Int column = at + 16 * block;
                T *to = out + row * width + column;
                if (dropped == AFTER) {
                    float all[16];
                    memcpy(all, &sums[block][row], 64);
                    uint32_t number = (uint32_t)((first + row) * width + column);
#pragma omp simd
                    for (Int i = 0; i < 16; i++)
                        to[i] = kept(number + (uint32_t)i, seed, threshold) ? put(get(to[i]) + all[i]) : to[i];
                } else
                    narrowed(sums[block][row], to, width - column);
            }
    }
}

// Rows whose adapter is -1 stay as they are; without `which` all are of the first.
void lora(const T *x, const Int *which, const T *down, const T *up, T *out, Int rows, Int in, Int rank, Int width) {
    Int whole = (width + 31) / 32 * 32;
#pragma omp parallel for schedule(dynamic)
    for (Int block = 0; block < rows; block += ROWS) {
        Int end = block + ROWS < rows ? block + ROWS : rows;
        for (Int start = block, stop; start < end; start = stop) {
            Int adapter = which ? which[start] : 0;
            for (stop = start + 1; stop < end && (!which || which[stop] == adapter);) stop++;
            if (adapter >= 0)
                some_rows(x + start * in, down + adapter * in * rank, up + adapter * rank * whole, out + start * width,
                          NULL, stop - start, in, rank, width, start, 0, 0, NOWHERE);
        }
    }
}

// The same for training: one adapter, dropout, and what is between is kept; all sizes are multiples of 32.
void lora_in_training(const T *x, const T *down, const T *up, T *out, T *middle, Int rows, Int in, Int rank, Int width,
                      uint64_t seed, uint32_t threshold, Int dropped) {
#pragma omp parallel for schedule(static)
    for (Int start = 0; start < rows; start += ROWS) {
        Int count = start + ROWS < rows ? ROWS : rows - start;
        some_rows(x + start * in, down, up, out + start * width, middle + start * rank, count, in, rank, width, start,
                  seed, threshold, dropped);
    }
}
