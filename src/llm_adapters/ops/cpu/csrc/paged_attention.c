// Generation: the paged key-value cache, and attention of new tokens over it (Kwon et al. 2023).
//
// A page (block) has the keys or values of `page_size` neighbouring tokens of one sequence. A sequence's tokens follow
// the shared prefix, which is stored once for each adapter:
//
//     prefix_keys: (adapters, num_kv_heads, prefix, head_dim)        keys: (pages, num_kv_heads, page_size, head_dim)
//
//     positions   0 .. prefix - 1     prefix .. prefix + page_size - 1     ...
//                 [ the prefix   ]    [ page block_table[slot][0]     ]    [ page block_table[slot][1] ]  ...

#include "numbers.h"

// Puts the keys (or values) of tokens in their pages.
// from: (tokens, num_kv_heads, head_dim); cache: (pages, num_kv_heads, page_size, head_dim); pages, columns: (tokens,),
// the page of each token and its place in that.
void store_kv(const scalar_t *from, scalar_t *cache, const index_t *pages, const index_t *columns, index_t page_size,
              index_t tokens, index_t num_kv_heads, index_t head_dim) {
#pragma omp parallel for schedule(static)
    for (index_t token = 0; token < tokens; token++)
        for (index_t head = 0; head < num_kv_heads; head++)
            memcpy(cache + ((pages[token] * num_kv_heads + head) * page_size + columns[token]) * head_dim,
                   from + (token * num_kv_heads + head) * head_dim, head_dim * sizeof(scalar_t));
}

// The place of entry i of a row after `load_32`, which takes even and odd entries apart. Queries are stored in this
// order, so that keys and values need no reordering.
static inline index_t lane_of(index_t i, index_t head_dim) {
#ifdef BFLOAT16
    if (head_dim == 64 || head_dim == 96 || head_dim == 128) return i / 32 * 32 + i % 2 * 16 + i % 32 / 2;
#endif
    (void)head_dim;
    return i;
}

// Written as halves of halves, as compilers otherwise add 16 lanes one after the other.
static inline float sum_lanes(f32x16 values) {
    typedef float f32x8 __attribute__((vector_size(32)));
    typedef float f32x4 __attribute__((vector_size(16)));
    f32x8 halves[2];
    f32x4 quarters[2];
    memcpy(halves, &values, 64);
    halves[0] += halves[1];
    memcpy(quarters, halves, 32);
    quarters[0] += quarters[1];
    return (quarters[0][0] + quarters[0][1]) + (quarters[0][2] + quarters[0][3]);
}

// Pages are anywhere in memory: the processor cannot guess which one is next.
static void prefetch(const scalar_t *from, index_t count) {
    for (index_t i = 0; i < count; i += 64 / sizeof(scalar_t)) __builtin_prefetch(from + i);
}

// scores[row][token] = queries[row] . keys[token]; a row of scores has `page_size` places.
static inline __attribute__((always_inline)) void qk(const float *queries, const scalar_t *keys, const scalar_t *values,
                                                     const scalar_t *next_keys, float *scores, index_t rows,
                                                     index_t tokens, index_t page_size, index_t head_dim) {
    for (index_t token = 0; token < tokens; token++) {
        prefetch(values + token * head_dim, head_dim);
        if (next_keys) prefetch(next_keys + token * head_dim, head_dim);
        const scalar_t *key = keys + token * head_dim;
        f32x16 key_lanes[8];
#pragma GCC unroll 4
        for (index_t i = 0; i < head_dim / 16; i += 2) load_32(key + 16 * i, key_lanes + i, key_lanes + i + 1);
        for (index_t row = 0; row < rows; row++) {
            f32x16 sum = {0};
#pragma GCC unroll 8
            for (index_t i = 0; i < head_dim / 16; i++) {
                f32x16 query;
                memcpy(&query, queries + row * head_dim + 16 * i, 64);
                sum += query * key_lanes[i];
            }
            scores[row * page_size + token] = sum_lanes(sum);
        }
    }
}

// sums[row] += sum over tokens of probs[row][token] * values[token]
static inline __attribute__((always_inline)) void pv(const float *probs, const scalar_t *values, float *sums,
                                                     index_t rows, index_t tokens, index_t page_size,
                                                     index_t head_dim) {
    for (index_t row = 0; row < rows; row++) {
        f32x16 lanes[8];
        memcpy(lanes, sums + row * head_dim, head_dim * sizeof(float));
        for (index_t token = 0; token < tokens; token++)
#pragma GCC unroll 4
            for (index_t i = 0; i < head_dim / 16; i += 2) {
                f32x16 first, second;
                load_32(values + token * head_dim + 16 * i, &first, &second);
                lanes[i] += probs[row * page_size + token] * first;
                lanes[i + 1] += probs[row * page_size + token] * second;
            }
        memcpy(sums + row * head_dim, lanes, head_dim * sizeof(float));
    }
}

// The same for head sizes that are no constant here.
static void any_qk(const float *queries, const scalar_t *keys, const scalar_t *values, const scalar_t *next_keys,
                   float *scores, index_t rows, index_t tokens, index_t page_size, index_t head_dim) {
    prefetch(values, tokens * head_dim);
    if (next_keys) prefetch(next_keys, tokens * head_dim);
    for (index_t row = 0; row < rows; row++)
        for (index_t token = 0; token < tokens; token++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (index_t i = 0; i < head_dim; i++)
                sum += queries[row * head_dim + i] * to_float(keys[token * head_dim + i]);
            scores[row * page_size + token] = sum;
        }
}

static void any_pv(const float *probs, const scalar_t *values, float *sums, index_t rows, index_t tokens,
                   index_t page_size, index_t head_dim) {
    for (index_t row = 0; row < rows; row++)
        for (index_t token = 0; token < tokens; token++)
#pragma omp simd
            for (index_t i = 0; i < head_dim; i++)
                sums[row * head_dim + i] += probs[row * page_size + token] * to_float(values[token * head_dim + i]);
}

// A step of the online softmax: scores become exponentials, and what their row has so far is scaled to the same largest
// score.
static void online_softmax(float *scores, index_t tokens, index_t head_dim, float *largest, float *sum,
                           float *value_sums) {
    float before = *largest, now = before, page_sum = 0;
#pragma omp simd reduction(max : now)
    for (index_t token = 0; token < tokens; token++) now = max_f32(now, scores[token]);
    float reference = now == -INFINITY ? 0.0f : now;  // a row that sees nothing yet
#pragma omp simd reduction(+ : page_sum)
    for (index_t token = 0; token < tokens; token++) {
        scores[token] = scores[token] == -INFINITY ? 0.0f : exp_f32(scores[token] - reference);
        page_sum += scores[token];
    }
    *largest = now;
    if (now > before) {
        float factor = before == -INFINITY ? 0.0f : exp_f32(before - now);
        *sum *= factor;
        for (index_t i = 0; i < head_dim; i++) value_sums[i] *= factor;
    }
    *sum += page_sum;
}

// With a constant head size compilers keep a whole row in registers.
#define FOR_HEAD_DIM(name, ...)                                                                                        \
    switch (head_dim) {                                                                                                \
    case 64: name(__VA_ARGS__, 64); break;                                                                             \
    case 96: name(__VA_ARGS__, 96); break;                                                                             \
    case 128: name(__VA_ARGS__, 128); break;                                                                           \
    default: any_##name(__VA_ARGS__, head_dim);                                                                        \
    }

// Attention of the new tokens of some sequences over what these have in the cache, themselves included.
// query, out: (num_seqs * num_query_tokens, num_heads, head_dim); keys, values: (pages, num_kv_heads, page_size,
// head_dim); prefix_keys, prefix_values: (adapters, num_kv_heads, prefix, head_dim), or NULL with prefix 0;
// adapter_ids: (num_seqs,); block_table: (slots, max_blocks); slots: (num_seqs,), -1 for padding; positions: (num_seqs,
// num_query_tokens); slopes: (num_heads,), float32, or NULL: ALiBi; window, softcap: 0 for none.
void paged_attention(const scalar_t *query, const scalar_t *keys, const scalar_t *values, const scalar_t *prefix_keys,
                     const scalar_t *prefix_values, const index_t *adapter_ids, const index_t *block_table,
                     const index_t *slots, const index_t *positions, scalar_t *out, const float *slopes,
                     index_t num_seqs, index_t num_query_tokens, index_t num_heads, index_t num_kv_heads,
                     index_t head_dim, index_t page_size, index_t prefix, index_t max_blocks, index_t window,
                     float scale, float softcap) {
    // One task has all rows that look at the same keys: each token's queries of a group of heads.
    index_t group_size = num_heads / num_kv_heads, rows = num_query_tokens * group_size;
    index_t page_entries = page_size * head_dim;
#pragma omp parallel for schedule(dynamic)
    for (index_t task = 0; task < num_seqs * num_kv_heads; task++) {
        index_t seq = task / num_kv_heads, kv_head = task % num_kv_heads;
        const index_t *seq_positions = positions + seq * num_query_tokens;
        float queries[rows * head_dim], value_sums[rows * head_dim], scores[rows * page_size];
        float largest[rows], sums[rows];
        index_t end = prefix;
        for (index_t row = 0; row < rows; row++) {
            index_t token = seq * num_query_tokens + row / group_size;
            const scalar_t *from = query + (token * num_heads + kv_head * group_size + row % group_size) * head_dim;
            for (index_t i = 0; i < head_dim; i++) {
                queries[row * head_dim + lane_of(i, head_dim)] = to_float(from[i]) * scale;
                value_sums[row * head_dim + i] = 0;
            }
            largest[row] = -INFINITY, sums[row] = 0;
            if (slots[seq] >= 0 && seq_positions[row / group_size] >= end) end = seq_positions[row / group_size] + 1;
        }
        for (index_t first = 0; first < end;) { // a piece of the prefix, or a page
            const scalar_t *key, *value;
            index_t tokens;
            if (first < prefix) {
                tokens = prefix - first;
                index_t at = ((adapter_ids[seq] * num_kv_heads + kv_head) * prefix + first) * head_dim;
                key = prefix_keys + at, value = prefix_values + at;
            } else {
                index_t page = block_table[slots[seq] * max_blocks + (first - prefix) / page_size];
                tokens = end - first;
                key = keys + (page * num_kv_heads + kv_head) * page_entries;
                value = values + (page * num_kv_heads + kv_head) * page_entries;
            }
            if (tokens > page_size) tokens = page_size;
            const scalar_t *next_keys = NULL;
            if (first + tokens >= prefix && first + tokens < end) {
                index_t page = block_table[slots[seq] * max_blocks + (first + tokens - prefix) / page_size];
                next_keys = keys + (page * num_kv_heads + kv_head) * page_entries;
            }
            FOR_HEAD_DIM(qk, queries, key, value, next_keys, scores, rows, tokens, page_size);
            for (index_t row = 0; row < rows; row++) {
                index_t visible = seq_positions[row / group_size] + 1 - first, hidden = window ? visible - window : 0;
                float *row_scores = scores + row * page_size;
                float slope = slopes ? slopes[kv_head * group_size + row % group_size] : 0;
                if (softcap)
#pragma omp simd
                    for (index_t token = 0; token < tokens; token++)
                        row_scores[token] = softcap * tanh_f32(row_scores[token] / softcap);
                if (slope)
#pragma omp simd
                    for (index_t token = 0; token < tokens; token++)
                        row_scores[token] += slope * (float)(token + 1 - visible);
                for (index_t token = visible < 0 ? 0 : visible; token < tokens; token++) row_scores[token] = -INFINITY;
                for (index_t token = 0; token < hidden && token < tokens; token++) row_scores[token] = -INFINITY;
                online_softmax(row_scores, tokens, head_dim, largest + row, sums + row, value_sums + row * head_dim);
            }
            FOR_HEAD_DIM(pv, scores, value, value_sums, rows, tokens, page_size);
            first += tokens;
        }
        for (index_t row = 0; row < rows; row++) {
            index_t token = seq * num_query_tokens + row / group_size;
            scalar_t *to = out + (token * num_heads + kv_head * group_size + row % group_size) * head_dim;
            float factor = sums[row] > 0 ? 1.0f / sums[row] : 0.0f;
            for (index_t i = 0; i < head_dim; i++)
                to[i] = from_float(value_sums[row * head_dim + lane_of(i, head_dim)] * factor);
        }
    }
}
