// Generation: keys and values in pages, and the attention of answers in the making.

#include "numbers.h"

void store(const T *from, T *cache, const Int *pages, const Int *columns, Int page, Int tokens, Int heads, Int width) {
#pragma omp parallel for schedule(static)
    for (Int token = 0; token < tokens; token++)
        for (Int head = 0; head < heads; head++)
            memcpy(cache + ((pages[token] * heads + head) * page + columns[token]) * width,
                   from + (token * heads + head) * width, width * sizeof(T));
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
