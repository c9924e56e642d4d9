// What would be several passes over memory in torch, in one. Compiled once per machine and precision by kernels.py,
// with BFLOAT16 defined or not; all arithmetic is float32, only what lies in memory is T. Tensors are dense, rows of the
// last dimension; each function's arguments are described by its caller in kernels.py.

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
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

void silu_gate_backward(const T *grad, const T *gate, const T *up, T *d_gate, T *d_up, T *out, Int count) {
    EACH(count) {
        float x = get(gate[i]), s = sigmoid(x), g = get(grad[i]), u = get(up[i]);
        d_up[i] = put(g * x * s);
        d_gate[i] = put(g * u * (s + x * s * (1.0f - s)));
        out[i] = put(get(put(x * s)) * u);
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

// out += (x down) up, for no more than ROWS rows of one adapter; `in` is even, `rank` a multiple of 32.
static void some_rows(const T *x, const T *down, const T *up, T *out, Int rows, Int in, Int rank, Int width) {
    T own[ROWS * rank];
    const T *from[ROWS], *between[ROWS];
    for (Int row = 0; row < ROWS; row++)  // those that are missing are computed and dropped
        from[row] = x + (row < rows ? row : 0) * in, between[row] = own + row * rank;
    for (Int at = 0; at < rank; at += 32) {
        Lanes sums[2][ROWS] = {0};
        multiply(from, down + at * in, in / 2, sums);
        for (Int block = 0; block < 2; block++)
            for (Int row = 0; row < ROWS; row++) narrowed(sums[block][row], own + row * rank + at + 16 * block, 16);
    }
    for (Int at = 0; at < width; at += 32) {
        Lanes sums[2][ROWS] = {0};
        for (Int block = 0; block < 2; block++)
            for (Int row = 0; row < rows; row++)
                sums[block][row] = widened(out + row * width + at + 16 * block, width - at - 16 * block);
        multiply(between, up + at * rank, rank / 2, sums);
        for (Int block = 0; block < 2; block++)
            for (Int row = 0; row < rows; row++) {
                Int column = at + 16 * block;
                narrowed(sums[block][row], out + row * width + column, width - column);
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
                          stop - start, in, rank, width);
        }
    }
}

// --- products of many rows with frozen weights, and a LoRA on them

#if defined(BFLOAT16) && defined(__AVX512BF16__) && !defined(__AMX_BF16__) // a matrix unit is torch's to use
#include <omp.h>

#define STRIP 14         // rows at a time: with 32 columns as many sums as registers can hold
#define UNIT (7 * STRIP) // rows that are read from the second cache again and again

typedef uint32_t Words __attribute__((vector_size(64)));

// sums += rows of x times two blocks of columns of weights, which are `apart` entries apart, as for `multiply`. From pair
// to pair of a row it is `along` entries, and to the next row `step`.
static inline __attribute__((always_inline)) void strip(const T *x, Int step, Int along, const T *weights, Int apart,
                                                        Int pairs, __m512 sums[][2], const Int rows) {
    for (Int i = 0; i < pairs; i++) {
        __m512bh first = (__m512bh)_mm512_loadu_si512(weights + 32 * i);
        __m512bh second = (__m512bh)_mm512_loadu_si512(weights + apart + 32 * i);
#pragma GCC unroll 14
        for (Int row = 0; row < rows; row++) {
            int pair;
            memcpy(&pair, x + row * step + i * along, 4);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            sums[row][0] = _mm512_dpbf16_ps(sums[row][0], first, both);
            sums[row][1] = _mm512_dpbf16_ps(sums[row][1], second, both);
        }
    }
}

static inline __attribute__((always_inline)) void clear(__m512 sums[][2], const Int rows) {
#pragma GCC unroll 14
    for (Int row = 0; row < rows; row++) sums[row][0] = sums[row][1] = _mm512_setzero_ps();
}

static inline __attribute__((always_inline)) void write(__m512 sums[STRIP][2], T *to, Int step) {
#pragma GCC unroll 14
    for (Int row = 0; row < STRIP; row++)
#pragma GCC unroll 2
        for (Int block = 0; block < 2; block++)
            _mm256_storeu_si256((__m256i *)(to + row * step + 16 * block),
                                (__m256i)_mm512_cvtneps_pbh(sums[row][block]));
}

// `kept` for 16 neighbours: all bits or none.
static inline Words kept_words(uint32_t first, uint64_t seed, uint32_t threshold) {
    const Words count = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Words h = count + (first + (uint32_t)seed);
    h ^= h >> 16;
    h *= 0x85ebca6b;
    h ^= (uint32_t)(seed >> 32);
    h ^= h >> 13;
    h *= 0xc2b2ae35;
    return (Words)((h ^ (h >> 16)) >= threshold);
}

// For 32 neighbours, a bit each.
static inline __mmask32 kept_bits(uint32_t first, uint64_t seed, uint32_t threshold) {
    __mmask16 low = _mm512_movepi32_mask((__m512i)kept_words(first, seed, threshold));
    return low | (__mmask32)_mm512_movepi32_mask((__m512i)kept_words(first + 16, seed, threshold)) << 16;
}

// 16 rows of 16 pairs, `from_step` entries apart, become 16 rows of those pairs' columns.
static inline void turned(const T *from, Int from_step, T *to) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (Int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * from_step);
#pragma GCC unroll 8
    for (Int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (Int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (Int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
#pragma GCC unroll 4
    for (Int i = 0; i < 4; i++) {
        __m512i even = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), odd = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        __m512i more = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        __m512i rest = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
        _mm512_storeu_si512(to + 32 * i, _mm512_shuffle_i32x4(even, more, 0x88));
        _mm512_storeu_si512(to + 32 * (i + 4), _mm512_shuffle_i32x4(odd, rest, 0x88));
        _mm512_storeu_si512(to + 32 * (i + 8), _mm512_shuffle_i32x4(even, more, 0xdd));
        _mm512_storeu_si512(to + 32 * (i + 12), _mm512_shuffle_i32x4(odd, rest, 0xdd));
    }
}

// Two rows of 32 neighbours become pairs, of the first 16 and, `step` entries on, of the others.
static inline void zipped(const __m512i first, const __m512i second, T *to, Int step) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(first, low, second));
    _mm512_storeu_si512(to + step, _mm512_permutex2var_epi16(first, high, second));
}

// Two blocks of columns of a matrix (in, width), or if `across` (width, in), in the order in which `strip` reads them.
static void lay_out(const T *weight, T *to, Int in, Int width, Int column, Int across) {
    if (across)
        for (Int block = 0; block < 2; block++)
            for (Int i = 0; i < in; i += 32)
                turned(weight + (column + 16 * block) * in + i, in, to + 16 * (block * in + i));
    else
        for (Int i = 0; i < in; i += 2) {
            const T *from = weight + i * width + column;
            zipped(_mm512_loadu_si512(from), _mm512_loadu_si512(from + width), to + 16 * i, 16 * in);
        }
}

// What dropout does to a LoRA: nothing, to what goes in (forward), to what is added in the end (backward).
enum { NOWHERE, BEFORE, AFTER };

// out = x weight + bias + (x down) up; all widths are multiples of 32; without a LoRA `rank` is 0. What is between the
// LoRA's matrices is written to `middle`, whose rows are a multiple of STRIP.
void product(const T *x, const T *weight, const T *bias, T *out, const T *down, const T *up, T *middle, Int rows,
             Int in, Int width, Int rank, Int across, uint64_t seed, uint32_t threshold, Int dropped) {
    Int pieces = width / 32, whole = rows / STRIP * STRIP, rest = rows - whole;
#pragma omp parallel
    {
        T last[STRIP * in], some[dropped == BEFORE ? STRIP * in : 1], own[32 * in], left[STRIP * 32];
        memcpy(last, x + whole * in, rest * in * sizeof(T));
        memset(last + rest * in, 0, (STRIP - rest) * in * sizeof(T));
#pragma omp for schedule(dynamic)
        for (Int row = 0; row < (rank ? rows : 0); row += STRIP) {
            const T *from = row == whole ? last : x + row * in;
            if (dropped == BEFORE) {
                for (Int i = 0; i < STRIP * in; i += 32) {
                    __mmask32 stays = kept_bits((uint32_t)(row * in + i), seed, threshold);
                    _mm512_storeu_si512(some + i, _mm512_maskz_loadu_epi16(stays, from + i));
                }
                from = some;
            }
            for (Int at = 0; at < rank; at += 32) {
                __m512 sums[STRIP][2];
                clear(sums, STRIP);
                strip(from, in, 2, down + at * in, 16 * in, in / 2, sums, STRIP);
                write(sums, middle + row * rank + at, rank);
            }
        }
        // Enough units for all threads: parts of the rows for each piece of the columns.
        Int parts = (16 * omp_get_num_threads() + pieces - 1) / pieces, strips = (rows + STRIP - 1) / STRIP;
#pragma omp for schedule(dynamic)
        for (Int unit = 0; unit < pieces * parts; unit++) {
            Int column = unit / parts * 32, part = unit % parts;
            lay_out(weight, own, in, width, column, across);
            for (Int row = part * strips / parts * STRIP; row < (part + 1) * strips / parts * STRIP; row += STRIP) {
                __m512 sums[STRIP][2];
                clear(sums, STRIP);
                if (rank) strip(middle + row * rank, rank, 2, up + column * rank, 16 * rank, rank / 2, sums, STRIP);
                if (dropped == AFTER)
#pragma GCC unroll 14
                    for (Int i = 0; i < STRIP; i++)
#pragma GCC unroll 2
                        for (Int block = 0; block < 2; block++) {
                            uint32_t number = (uint32_t)((row + i) * width + column + 16 * block);
                            Words stays = kept_words(number, seed, threshold);
                            sums[i][block] = (__m512)((Words)sums[i][block] & stays);
                        }
                strip(row == whole ? last : x + row * in, in, 2, own, 16 * in, in / 2, sums, STRIP);
                if (bias)
#pragma GCC unroll 14
                    for (Int i = 0; i < STRIP; i++)
#pragma GCC unroll 2
                        for (Int block = 0; block < 2; block++)
                            sums[i][block] += (__m512)widened(bias + column + 16 * block, 16);
                if (row < whole) {
                    write(sums, out + row * width + column, width);
                    continue;
                }
                write(sums, left, 32);
                for (Int i = 0; i < rest; i++)
                    memcpy(out + (whole + i) * width + column, left + 32 * i, 32 * sizeof(T));
            }
        }
    }
}

#define BAND 2048 // rows whose pairs are in the second cache

// out (rank, width) = scale * (left^T x), left (rows, rank), x (rows, width) with its entries dropped or not.
void outer(const T *left, const T *x, T *pairs, float *out, Int rows, Int rank, Int width, uint64_t seed,
           uint32_t threshold, Int dropped, float scale) {
    for (Int band = 0; band < rows; band += BAND) {
        Int count = rows - band < BAND ? rows - band : BAND, even = (count + 1) / 2 * 2;
        const T *from = x + band * width;
#pragma omp parallel
        {
            T own[even * 32];
#pragma omp for schedule(static)
            for (Int i = 0; i < count; i += 2)
                for (Int at = 0; at < rank; at += 32) {
                    const T *two = left + (band + i) * rank + at;
                    __m512i second = i + 1 < count ? _mm512_loadu_si512(two + rank) : _mm512_setzero_si512();
                    zipped(_mm512_loadu_si512(two), second, pairs + i * rank + 2 * at, 32);
                }
#pragma omp for schedule(dynamic)
            for (Int column = 0; column < width; column += 32) {
                for (Int i = 0; i < even; i += 2) {
                    __m512i both[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
                    for (Int j = 0; j < 2 && i + j < count; j++) {
                        uint32_t number = (uint32_t)((band + i + j) * width + column);
                        __mmask32 stays = dropped ? kept_bits(number, seed, threshold) : 0xffffffff;
                        both[j] = _mm512_maskz_loadu_epi16(stays, from + (i + j) * width + column);
                    }
                    zipped(both[0], both[1], own + 16 * i, 16 * even);
                }
                for (Int at = 0; at < rank; at += ROWS) {
                    __m512 sums[ROWS][2];
                    clear(sums, ROWS);
                    strip(pairs + 2 * at, 2, 2 * rank, own, 16 * even, even / 2, sums, ROWS);
                    for (Int row = 0; row < ROWS; row++)
                        for (Int block = 0; block < 2; block++) {
                            float *to = out + (at + row) * width + column + 16 * block;
                            Lanes sum = (Lanes)sums[row][block] * scale, before = {0};
                            if (band) memcpy(&before, to, 64);
                            sum += before;
                            memcpy(to, &sum, 64);
                        }
                }
            }
        }
    }
}

// --- attention of segments in training: each over the shared prefix and itself

#define BANK (16 * STRIP) // rows whose probabilities are kept for the gradients of keys and values

// Where a segment begins and ends, and how many tokens at the beginning of the row it sees besides.
typedef struct {
    Int start, end, before;
} Span;

// What one head of one segment works with; all rows are filled up to whole strips and pieces with zeros.
typedef struct {
    Int rows, before, seen, columns, width, window; // own rows, those before, both, and whole pieces of both
    float scale;
} Head;

static void gather(const T *from, T *to, Span span, Int columns, Int step, Int width) {
    for (Int i = 0; i < span.before; i++) memcpy(to + i * width, from + i * step, width * sizeof(T));
    Int own = span.end - span.start;
    for (Int i = 0; i < own; i++) memcpy(to + (span.before + i) * width, from + (span.start + i) * step, width * sizeof(T));
    memset(to + (span.before + own) * width, 0, (columns - span.before - own) * width * sizeof(T));
}

// Rows of a segment, `step` apart, next to each other and with zeros at their end.
static void some(const T *from, T *to, Int count, Int whole, Int step, Int width) {
    for (Int i = 0; i < count; i++) memcpy(to + i * width, from + i * step, width * sizeof(T));
    memset(to + count * width, 0, (whole - count) * width * sizeof(T));
}

// In the order for products with rows of `width`, and for products with rows of columns.
static void lay_out_both(const T *rows, T *pieces, T *turned_pieces, Int columns, Int width) {
    for (Int at = 0; at < columns; at += 32) lay_out(rows, pieces + at * width, width, columns, at, 1);
    for (Int at = 0; at < width && turned_pieces; at += 32)
        lay_out(rows, turned_pieces + at * columns, columns, width, at, 0);
}

static Int first_seen(const Head *h, Int row) {
    Int end = h->before + row + 1;
    return h->window && end > h->window ? end - h->window : 0;
}

// A strip of rows times pieces of columns from `first` to `last`: floats, `columns` in a row.
static inline __attribute__((always_inline)) void strip_scores(const Head *h, const T *x, const T *pieces, Int first,
                                                               Int last, float *to) {
    for (Int at = first; at < last; at += 32) {
        __m512 sums[STRIP][2];
        clear(sums, STRIP);
        strip(x, h->width, 2, pieces + at * h->width, 16 * h->width, h->width / 2, sums, STRIP);
#pragma GCC unroll 14
        for (Int i = 0; i < STRIP; i++)
#pragma GCC unroll 2
            for (Int block = 0; block < 2; block++)
                _mm512_storeu_ps(to + i * h->columns + at + 16 * block, sums[i][block]);
    }
}

// A strip of rows of columns from `first` to `last` times what lies in `turned_pieces`, each row times its factor.
static inline __attribute__((always_inline)) void strip_sums(const Head *h, const T *rows, const T *turned_pieces,
                                                             Int first, Int last, const float *factors, T *to,
                                                             Int count, Int step) {
    T whole[STRIP * 32];
    for (Int at = 0; at < h->width; at += 32) {
        __m512 sums[STRIP][2];
        clear(sums, STRIP);
        strip(rows + first, h->columns, 2, turned_pieces + at * h->columns + 16 * first, 16 * h->columns,
              (last - first) / 2, sums, STRIP);
#pragma GCC unroll 14
        for (Int i = 0; i < STRIP; i++) {
            sums[i][0] *= factors[i];
            sums[i][1] *= factors[i];
        }
        write(sums, whole, 32);
        for (Int i = 0; i < count; i++) memcpy(to + i * step + at, whole + 32 * i, 32 * sizeof(T));
    }
}

static Head head_of(Span span, Int width, float scale, Int window) {
    Int rows = span.end - span.start, seen = rows + span.before;
    return (Head){.rows = rows, .before = span.before, .seen = seen, .columns = (seen + 31) / 32 * 32, .width = width,
                  .scale = scale, .window = window};
}

// out (tokens, heads, width), and for each row the logarithm of its sum of exponentials.
void attention(const T *query, const T *key, const T *value, const Int *spans, T *out, float *sums, Int count,
               Int heads, Int groups, Int width, float scale, Int window) {
#pragma omp parallel for schedule(dynamic)
    for (Int task = 0; task < count * heads; task++) {
        Span span = ((const Span *)spans)[task / heads];
        Int number = task % heads, group = number / (heads / groups), step = heads * width;
        Head h = head_of(span, width, scale, window);
        T *room = aligned_alloc(64, (4 * h.columns * width + 2 * STRIP * (h.columns + width)) * sizeof(float));
        T *rows = room, *pieces = rows + h.columns * width, *value_rows = pieces + h.columns * width;
        T *chances = value_rows + h.columns * width, *asking = chances + STRIP * h.columns;
        float *scores = (float *)(asking + STRIP * width);
        gather(key + group * width, rows, span, h.columns, groups * width, width);
        lay_out_both(rows, pieces, NULL, h.columns, width);
        gather(value + group * width, rows, span, h.columns, groups * width, width);
        for (Int at = 0; at < width; at += 32) lay_out(rows, value_rows + at * h.columns, h.columns, width, at, 0);
        for (Int row = 0; row < h.rows; row += STRIP) {
            Int these = h.rows - row < STRIP ? h.rows - row : STRIP;
            Int first = first_seen(&h, row) / 32 * 32, last = (h.before + row + these + 31) / 32 * 32;
            float factors[STRIP] = {0};
            T *to = out + (span.start + row) * step + number * width;
            some(query + (span.start + row) * step + number * width, asking, these, STRIP, step, width);
            strip_scores(&h, asking, pieces, first, last, scores);
            memset(chances, 0, STRIP * h.columns * sizeof(T));
            for (Int i = 0; i < these; i++) {
                const float *own = scores + i * h.columns;
                T *chance = chances + i * h.columns;
                Int from = first_seen(&h, row + i), end = h.before + row + i + 1;
                float largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
                for (Int j = from; j < end; j++) largest = most(largest, own[j]);
#pragma omp simd reduction(+ : sum)
                for (Int j = from; j < end; j++) {
                    float p = exponential((own[j] - largest) * scale);
                    sum += p;
                    chance[j] = put(p);
                }
                factors[i] = 1.0f / sum;
                sums[(span.start + row + i) * heads + number] = largest * scale + logf(sum);
            }
            strip_sums(&h, chances, value_rows, first, last, factors, to, these, step);
        }
        free(room);
    }
}

// sums (columns, width) += pairs of rows (`pairs`, from `pair` on, (rows / 2, columns, 2)) turned, times rows.
static void strip_outer(const Head *h, const T *zipped_rows, const T *turned_pieces, Int rows, Int columns_from,
                        Int first_row, float *to) {
    Int pair = first_row / 2;
    for (Int at = 0; at < h->width; at += 32) {
        __m512 sums[STRIP][2];
        float *own = to + columns_from * h->width + at;
#pragma GCC unroll 14
        for (Int i = 0; i < STRIP; i++)
#pragma GCC unroll 2
            for (Int block = 0; block < 2; block++) sums[i][block] = _mm512_loadu_ps(own + i * h->width + 16 * block);
        strip(zipped_rows + pair * 2 * h->columns + 2 * columns_from, 2, 2 * h->columns,
              turned_pieces + at * rows + 32 * pair, 16 * rows, rows / 2 - pair, sums, STRIP);
#pragma GCC unroll 14
        for (Int i = 0; i < STRIP; i++)
#pragma GCC unroll 2
            for (Int block = 0; block < 2; block++) _mm512_storeu_ps(own + i * h->width + 16 * block, sums[i][block]);
    }
}

// The gradients of `attention`; those of keys and values for each head: of a segment's own (tokens, heads, width), and of
// those before (segments, before, heads, width).
void attention_backward(const T *grad, const T *query, const T *key, const T *value, const Int *spans,
                        const float *sums, T *d_query, T *d_key, T *d_value, T *before_key, T *before_value, Int count,
                        Int heads, Int groups, Int width, float scale, Int window) {
#pragma omp parallel for schedule(dynamic)
    for (Int task = 0; task < count * heads; task++) {
        Span span = ((const Span *)spans)[task / heads];
        Int number = task % heads, group = number / (heads / groups), step = heads * width, at_head = number * width;
        Head h = head_of(span, width, scale, window);
        Int columns = h.columns, turned_rows = columns + STRIP, size = columns * width;
        Int shorts = 4 * size + 2 * BANK * (columns + 2 * width) + 2 * (BANK * columns + 2 * STRIP);
        T *room = aligned_alloc(64, (shorts * sizeof(T) + (2 * turned_rows * width + 2 * STRIP * columns) * 4 + 127) / 64 * 64);
        T *rows = room, *key_pieces = rows + size, *key_rows = key_pieces + size, *value_pieces = key_rows + size;
        T *chances = value_pieces + size, *shares = chances + BANK * columns;
        T *asking = shares + BANK * columns, *given = asking + BANK * width;
        T *asking_rows = given + BANK * width, *given_rows = asking_rows + BANK * width;
        T *zipped_chances = given_rows + BANK * width, *zipped_shares = zipped_chances + BANK * columns + 2 * STRIP;
        float *key_sums = (float *)(zipped_shares + BANK * columns + 2 * STRIP);
        float *value_sums = key_sums + turned_rows * width, *scores = value_sums + turned_rows * width;
        float *products_ = scores + STRIP * columns;
        memset(key_sums, 0, 2 * turned_rows * width * sizeof(float));
        gather(key + group * width, rows, span, columns, groups * width, width);
        lay_out_both(rows, key_pieces, key_rows, columns, width);
        gather(value + group * width, rows, span, columns, groups * width, width);
        lay_out_both(rows, value_pieces, NULL, columns, width);
        for (Int bank = 0; bank < h.rows; bank += BANK) {
            Int these = h.rows - bank < BANK ? h.rows - bank : BANK, whole = (these + STRIP - 1) / STRIP * STRIP;
            Int at_row = (span.start + bank) * step + at_head;
            some(query + at_row, asking, these, whole, step, width);
            some(grad + at_row, given, these, whole, step, width);
            memset(chances, 0, 2 * BANK * columns * sizeof(T));
            for (Int row = 0; row < these; row += STRIP) {
                Int few = these - row < STRIP ? these - row : STRIP;
                Int first = first_seen(&h, bank + row) / 32 * 32, last = (h.before + bank + row + few + 31) / 32 * 32;
                float factors[STRIP];
                strip_scores(&h, asking + row * width, key_pieces, first, last, scores);
                strip_scores(&h, given + row * width, value_pieces, first, last, products_);
                for (Int i = 0; i < few; i++) {
                    Int from = first_seen(&h, bank + row + i), end = h.before + bank + row + i + 1;
                    float *p = scores + i * columns, mean = 0;
                    const float *d = products_ + i * columns;
                    float known = sums[(span.start + bank + row + i) * heads + number];
                    T *chance = chances + (row + i) * columns, *share = shares + (row + i) * columns;
#pragma omp simd reduction(+ : mean)
                    for (Int j = from; j < end; j++) {
                        p[j] = exponential(p[j] * scale - known);
                        mean += p[j] * d[j];
                    }
#pragma omp simd
                    for (Int j = from; j < end; j++) {
                        chance[j] = put(p[j]);
                        share[j] = put(p[j] * (d[j] - mean));
                    }
                }
                for (Int i = 0; i < STRIP; i++) factors[i] = scale;
                strip_sums(&h, shares + row * columns, key_rows, first, last, factors, d_query + at_row + row * step, few,
                           step);
            }
            Int end = (h.before + bank + these + 31) / 32 * 32;
            if (end < columns) end += 32; // a strip of columns may begin before the end and reach over it
            for (Int row = 0; row < whole; row += 2)
                for (Int at = 0; at < end; at += 32) {
                    const T *p = chances + row * columns + at, *s = shares + row * columns + at;
                    zipped(_mm512_loadu_si512(p), _mm512_loadu_si512(p + columns), zipped_chances + row * columns + 2 * at, 32);
                    zipped(_mm512_loadu_si512(s), _mm512_loadu_si512(s + columns), zipped_shares + row * columns + 2 * at, 32);
                }
            for (Int at = 0; at < width; at += 32) {
                lay_out(given, given_rows + at * whole, whole, width, at, 0);
                lay_out(asking, asking_rows + at * whole, whole, width, at, 0);
            }
            for (Int at = 0; at < h.before + bank + these; at += STRIP) {
                Int first_row = at - h.before - bank > 0 ? at - h.before - bank : 0; // those that see it
                strip_outer(&h, zipped_chances, given_rows, whole, at, first_row, value_sums);
                strip_outer(&h, zipped_shares, asking_rows, whole, at, first_row, key_sums);
            }
        }
        for (Int i = 0; i < h.seen; i++) {
            Int place = i < h.before ? ((task / heads) * h.before + i) * step : (span.start + i - h.before) * step;
            T *to_key = (i < h.before ? before_key : d_key) + place + at_head;
            T *to_value = (i < h.before ? before_value : d_value) + place + at_head;
#pragma omp simd
            for (Int j = 0; j < width; j++) {
                to_key[j] = put(key_sums[i * width + j] * scale);
                to_value[j] = put(value_sums[i * width + j]);
            }
        }
        free(room);
    }
}
#endif
