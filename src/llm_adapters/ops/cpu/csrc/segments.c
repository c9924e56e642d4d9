// Attention of segments in training, each over the shared prefix and itself: nothing is padded but to whole strips, what
// a row does not see is not computed, and of its probabilities only the logarithm of their sum is kept.

#include "products.c"
#include <stdio.h>

#define BANK (16 * STRIP) // rows whose probabilities are there at once for the gradients of keys and values

// Where a segment begins and ends, and how many tokens at the beginning of all it sees besides.
typedef struct {
    Int start, end, before;
} Span;

// One head of a segment: its own rows, and what they may see, in whole pieces of 32.
typedef struct {
    Int rows, before, columns, width, window;
} Head;

static Head head_of(Span span, Int width, Int window) {
    Int rows = span.end - span.start;
    return (Head){rows, span.before, (rows + span.before + 31) / 32 * 32, width, window};
}

// The first column that a row sees; the last one is its own.
static Int first_seen(const Head *h, Int row) {
    Int end = h->before + row + 1;
    return h->window && end > h->window ? end - h->window : 0;
}

// Room for a task to work in.
static void *room_of(Int bytes) {
    void *room = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!room) {
        fprintf(stderr, "attention: no memory for %lld bytes\n", (long long)bytes);
        abort();
    }
    return room;
}

// A part of it.
static void *cut(char **room, Int bytes) {
    void *part = *room;
    *room += (bytes + 63) / 64 * 64;
    return part;
}

// `count` rows of this width, `step` apart, become neighbours, and zeros follow up to `whole` rows.
static void gather(const T *from, T *to, Int count, Int whole, Int step, Int width) {
    for (Int i = 0; i < count; i++) memcpy(to + i * width, from + i * step, width * sizeof(T));
    memset(to + count * width, 0, (whole - count) * width * sizeof(T));
}

// The keys or values that a segment sees.
static void gather_seen(const T *from, T *to, Span span, Int columns, Int step, Int width) {
    gather(from, to, span.before, span.before, step, width);
    gather(from + span.start * step, to + span.before * width, span.end - span.start, columns - span.before, step, width);
}

// Rows (columns, width) in the order for products with rows of `width`.
static void lay_across(const T *rows, T *to, Int columns, Int width) {
    for (Int at = 0; at < columns; at += 32) lay_out(rows, to + at * width, width, columns, at, 1);
}

// The same in the order for products with rows of `columns`.
static void lay_along(const T *rows, T *to, Int columns, Int width) {
    for (Int at = 0; at < width; at += 32) lay_out(rows, to + at * columns, columns, width, at, 0);
}

// A strip of rows times the columns from `first` to `last` that were laid `across`.
static inline __attribute__((always_inline)) void scores_of(const Head *h, const T *x, const T *across, Int first,
                                                            Int last, float *to) {
    for (Int at = first; at < last; at += 32) {
        __m512 sums[STRIP][2];
        clear(sums, STRIP);
        strip(x, h->width, 2, across + at * h->width, 16 * h->width, h->width / 2, sums, STRIP);
#pragma GCC unroll 14
        for (Int i = 0; i < STRIP; i++)
#pragma GCC unroll 2
            for (Int block = 0; block < 2; block++)
                _mm512_storeu_ps(to + i * h->columns + at + 16 * block, sums[i][block]);
    }
}

// A strip of rows of columns, from `first` to `last`, times what was laid `along`, each row times its factor; `count` rows
// are written, `step` apart.
static inline __attribute__((always_inline)) void sums_of(const Head *h, const T *rows, const T *along, Int first,
                                                          Int last, const float *factors, T *to, Int count, Int step) {
    T whole[STRIP * 32];
    for (Int at = 0; at < h->width; at += 32) {
        __m512 sums[STRIP][2];
        clear(sums, STRIP);
        strip(rows + first, h->columns, 2, along + at * h->columns + 16 * first, 16 * h->columns, (last - first) / 2,
              sums, STRIP);
#pragma GCC unroll 14
        for (Int i = 0; i < STRIP; i++)
#pragma GCC unroll 2
            for (Int block = 0; block < 2; block++) sums[i][block] *= factors[i];
        write(sums, whole, 32);
        for (Int i = 0; i < count; i++) memcpy(to + i * step + at, whole + 32 * i, 32 * sizeof(T));
    }
}

// out (tokens, heads, width), and for each of its rows the logarithm of the sum of exponentials.
void attention(const T *query, const T *key, const T *value, const Int *spans, T *out, float *logarithms, Int count,
               Int heads, Int groups, Int width, float scale, Int window) {
#pragma omp parallel for schedule(dynamic)
    for (Int task = 0; task < count * heads; task++) {
        Span span = ((const Span *)spans)[task / heads];
        Head h = head_of(span, width, window);
        Int number = task % heads, group = number / (heads / groups), step = heads * width;
        Int size = h.columns * width * sizeof(T);
        char *all = room_of(3 * size + STRIP * (6 * h.columns + 2 * width) + 6 * 64), *room = all;
        T *seen = cut(&room, size), *keys = cut(&room, size), *values = cut(&room, size);
        T *chances = cut(&room, STRIP * h.columns * sizeof(T)), *asking = cut(&room, STRIP * width * sizeof(T));
        float *scores = cut(&room, STRIP * h.columns * sizeof(float));
        gather_seen(key + group * width, seen, span, h.columns, groups * width, width);
        lay_across(seen, keys, h.columns, width);
        gather_seen(value + group * width, seen, span, h.columns, groups * width, width);
        lay_along(seen, values, h.columns, width);
        for (Int row = 0; row < h.rows; row += STRIP) {
            Int these = h.rows - row < STRIP ? h.rows - row : STRIP, place = (span.start + row) * step + number * width;
            Int first = first_seen(&h, row) / 32 * 32, last = (h.before + row + these + 31) / 32 * 32;
            float factors[STRIP] = {0};
            gather(query + place, asking, these, STRIP, step, width);
            scores_of(&h, asking, keys, first, last, scores);
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
                logarithms[(span.start + row + i) * heads + number] = largest * scale + logf(sum);
            }
            sums_of(&h, chances, values, first, last, factors, out + place, these, step);
        }
        free(all);
    }
}

// sums (columns, width) += the strip of columns that begins at `column`, of rows that lie in pairs, (rows / 2, columns,
// 2), times rows that were laid `along`, from row `first` on.
static void add_turned(const Head *h, const T *in_pairs, const T *along, Int rows, Int column, Int first, float *sums) {
    Int pair = first / 2;
    for (Int at = 0; at < h->width; at += 32) {
        __m512 own[STRIP][2];
        float *to = sums + column * h->width + at;
#pragma GCC unroll 14
        for (Int i = 0; i < STRIP; i++)
#pragma GCC unroll 2
            for (Int block = 0; block < 2; block++) own[i][block] = _mm512_loadu_ps(to + i * h->width + 16 * block);
        strip(in_pairs + 2 * (pair * h->columns + column), 2, 2 * h->columns, along + at * rows + 32 * pair, 16 * rows,
              rows / 2 - pair, own, STRIP);
#pragma GCC unroll 14
        for (Int i = 0; i < STRIP; i++)
#pragma GCC unroll 2
            for (Int block = 0; block < 2; block++) _mm512_storeu_ps(to + i * h->width + 16 * block, own[i][block]);
    }
}

// Rows of columns, up to `end`, in pairs of rows.
static void pair_rows(const T *from, T *to, Int rows, Int columns, Int end) {
    for (Int row = 0; row < rows; row += 2)
        for (Int at = 0; at < end; at += 32) {
            const T *first = from + row * columns + at;
            __m512i other = _mm512_loadu_si512(first + columns);
            zipped(_mm512_loadu_si512(first), other, to + row * columns + 2 * at, 32);
        }
}

// The gradients of `attention`; those of keys and values for each head: of a segment's own, (tokens, heads, width), and of
// those before it, (segments, before, heads, width).
void attention_backward(const T *grad, const T *query, const T *key, const T *value, const Int *spans,
                        const float *logarithms, T *d_query, T *d_key, T *d_value, T *before_key, T *before_value, Int count,
                        Int heads, Int groups, Int width, float scale, Int window) {
#pragma omp parallel for schedule(dynamic)
    for (Int task = 0; task < count * heads; task++) {
        Int segment = task / heads, number = task % heads, group = number / (heads / groups), step = heads * width;
        Span span = ((const Span *)spans)[segment];
        Head h = head_of(span, width, window);
        Int most_rows = h.rows < BANK ? (h.rows + STRIP - 1) / STRIP * STRIP : BANK;
        Int size = h.columns * width * sizeof(T), bank_size = most_rows * width * sizeof(T);
        Int square = most_rows * h.columns * sizeof(T), in_pairs = square + 2 * STRIP * sizeof(T); // read beyond their end
        Int gathered = (h.columns + STRIP) * width * sizeof(float), strip_size = STRIP * h.columns * sizeof(float);
        Int bytes = 4 * size + 4 * bank_size + 2 * square + 2 * in_pairs + 2 * gathered + 2 * strip_size;
        char *all = room_of(bytes + 16 * 64), *room = all;
        T *seen = cut(&room, size), *keys = cut(&room, size), *key_rows = cut(&room, size), *values = cut(&room, size);
        T *asking = cut(&room, bank_size), *asking_rows = cut(&room, bank_size);
        T *given = cut(&room, bank_size), *given_rows = cut(&room, bank_size);
        T *chances = cut(&room, square), *chance_pairs = cut(&room, in_pairs);
        T *shares = cut(&room, square), *share_pairs = cut(&room, in_pairs);
        float *key_sums = cut(&room, gathered), *value_sums = cut(&room, gathered);
        float *scores = cut(&room, strip_size), *slopes = cut(&room, strip_size);
        memset(key_sums, 0, gathered);
        memset(value_sums, 0, gathered);
        gather_seen(key + group * width, seen, span, h.columns, groups * width, width);
        lay_across(seen, keys, h.columns, width);
        lay_along(seen, key_rows, h.columns, width);
        gather_seen(value + group * width, seen, span, h.columns, groups * width, width);
        lay_across(seen, values, h.columns, width);
        for (Int bank = 0; bank < h.rows; bank += BANK) {
            Int these = h.rows - bank < BANK ? h.rows - bank : BANK, whole = (these + STRIP - 1) / STRIP * STRIP;
            Int place = (span.start + bank) * step + number * width, seen_before = h.before + bank;
            gather(query + place, asking, these, whole, step, width);
            gather(grad + place, given, these, whole, step, width);
            memset(chances, 0, square);
            memset(shares, 0, square);
            for (Int row = 0; row < these; row += STRIP) {
                Int few = these - row < STRIP ? these - row : STRIP;
                Int first = first_seen(&h, bank + row) / 32 * 32, last = (seen_before + row + few + 31) / 32 * 32;
                float factors[STRIP];
                scores_of(&h, asking + row * width, keys, first, last, scores);
                scores_of(&h, given + row * width, values, first, last, slopes);
                for (Int i = 0; i < few; i++) {
                    Int from = first_seen(&h, bank + row + i), end = seen_before + row + i + 1;
                    float *p = scores + i * h.columns, *d = slopes + i * h.columns, mean = 0;
                    float known = logarithms[(span.start + bank + row + i) * heads + number];
                    T *chance = chances + (row + i) * h.columns, *share = shares + (row + i) * h.columns;
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
                sums_of(&h, shares + row * h.columns, key_rows, first, last, factors, d_query + place + row * step, few,
                        step);
            }
            // A strip of columns may begin before the last that is seen and reach over the next piece.
            Int end = (seen_before + these + 31) / 32 * 32 + 32;
            if (end > h.columns) end = h.columns;
            pair_rows(chances, chance_pairs, whole, h.columns, end);
            pair_rows(shares, share_pairs, whole, h.columns, end);
            lay_along(given, given_rows, whole, width);
            lay_along(asking, asking_rows, whole, width);
            for (Int at = 0; at < seen_before + these; at += STRIP) {
                Int first = at > seen_before ? at - seen_before : 0; // the first row that sees one of them
                add_turned(&h, chance_pairs, given_rows, whole, at, first, value_sums);
                add_turned(&h, share_pairs, asking_rows, whole, at, first, key_sums);
            }
        }
        for (Int i = 0; i < h.before + h.rows; i++) {
            Int own = i - h.before, place = (own < 0 ? segment * h.before + i : span.start + own) * step + number * width;
            T *to_key = (own < 0 ? before_key : d_key) + place, *to_value = (own < 0 ? before_value : d_value) + place;
#pragma omp simd
            for (Int j = 0; j < width; j++) {
                to_key[j] = put(key_sums[i * width + j] * scale);
                to_value[j] = put(value_sums[i * width + j]);
            }
        }
        free(all);
    }
}
