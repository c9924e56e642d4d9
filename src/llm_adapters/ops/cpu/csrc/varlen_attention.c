// Attention of packs in training: each segment over the shared prefix and itself. Nothing is padded but to whole tiles,
// what a row does not see is not computed, and of the probabilities only the log-sum-exp (lse) of each row is kept,
// from which the backward pass computes them again (Dao et al. 2022).
//
// A row of the pack:   [ shared prefix | segment 0 | segment 1 | ... | padding ]
// cu_seqlens:          0               p           ...               end
//
//   keys:              prefix   segment            One task is a head of a segment. It packs what it sees of keys and
//   queries  row 0     x x x x  x                  values, goes through its rows a row tile (MR) at a time, and
//            row 1     x x x x  x x                computes only the column tiles (NR) with an x. The prefix itself
//            row 2     x x x x  x x x              is the first segment, and sees no other.
//
// Uses the tiles of gemm.c, which kernels.c includes before.
#include "numbers.h"
#include <omp.h>

#define ROW_BANK (16 * MR) // rows whose probabilities exist at once for the gradients of keys and values

// One head of a segment: where it is in the pack, and what its rows may see, in whole column tiles.
typedef struct {
    index_t segment, start, rows, prefix, columns, head, kv_head, num_heads, num_kv_heads, head_dim, window;
    float scale, slope, softcap; // of its scores, slope and cap 0 for none
} Task;

static Task task_of(index_t number, const int32_t *cu_seqlens, index_t prefix, index_t num_heads, index_t num_kv_heads,
                    index_t head_dim, float scale, index_t window, const float *slopes, float softcap) {
    index_t segment = number / num_heads, head = number % num_heads, start = cu_seqlens[segment];
    index_t rows = cu_seqlens[segment + 1] - start, before = segment ? prefix : 0;
    return (Task){.segment = segment, .start = start, .rows = rows, .prefix = before,
                  .columns = round_up(rows + before, NR), .head = head, .kv_head = head / (num_heads / num_kv_heads),
                  .num_heads = num_heads, .num_kv_heads = num_kv_heads, .head_dim = head_dim, .window = window,
                  .scale = scale, .slope = slopes ? slopes[head] : 0, .softcap = softcap};
}

// The first column that a row sees; the last one is its own.
static index_t first_visible(const Task *t, index_t row) {
    index_t end = t->prefix + row + 1;
    return t->window && end > t->window ? end - t->window : 0;
}

// A part of the workspace, in whole cache lines.
static void *carve(char **workspace, index_t bytes) {
    void *part = *workspace;
    *workspace += round_up(bytes, 64);
    return part;
}

// --- a task's workspace: the same function measures it (from address 0) and divides it

typedef struct {
    scalar_t *gathered, *k_packed, *v_packed, *probs, *q_tile;
    float *scores;
} ForwardSpace;

static index_t carve_forward(char *workspace, index_t columns, index_t head_dim, ForwardSpace *s) {
    char *next = workspace;
    index_t kv_tile = columns * head_dim * sizeof(scalar_t);
    s->gathered = carve(&next, kv_tile);
    s->k_packed = carve(&next, kv_tile);
    s->v_packed = carve(&next, kv_tile);
    s->probs = carve(&next, MR * columns * sizeof(scalar_t));
    s->q_tile = carve(&next, MR * head_dim * sizeof(scalar_t));
    s->scores = carve(&next, MR * columns * sizeof(float));
    return next - workspace;
}

typedef struct {
    scalar_t *gathered, *k_packed, *k_rows_packed, *v_packed;  // (columns, head_dim)
    scalar_t *q_tile, *q_packed, *do_tile, *do_packed;         // (bank, head_dim)
    scalar_t *probs, *probs_pairs, *dscores, *dscores_pairs;   // (bank, columns)
    float *dk_sums, *dv_sums;                                  // (columns, head_dim), and a row tile more
    float *scores, *dprobs, *cap_slopes;                       // (MR, columns)
} BackwardSpace;

static index_t carve_backward(char *workspace, index_t rows, index_t columns, index_t head_dim, BackwardSpace *s) {
    char *next = workspace;
    index_t bank = rows < ROW_BANK ? round_up(rows, MR) : ROW_BANK;
    index_t kv_tile = columns * head_dim * sizeof(scalar_t), bank_tile = bank * head_dim * sizeof(scalar_t);
    index_t square = bank * columns * sizeof(scalar_t);
    index_t pairs = square + 2 * MR * sizeof(scalar_t); // a row tile is read beyond the last column
    index_t sums = (columns + MR) * head_dim * sizeof(float), strip = MR * columns * sizeof(float);
    s->gathered = carve(&next, kv_tile), s->k_packed = carve(&next, kv_tile);
    s->k_rows_packed = carve(&next, kv_tile), s->v_packed = carve(&next, kv_tile);
    s->q_tile = carve(&next, bank_tile), s->q_packed = carve(&next, bank_tile);
    s->do_tile = carve(&next, bank_tile), s->do_packed = carve(&next, bank_tile);
    s->probs = carve(&next, square), s->probs_pairs = carve(&next, pairs);
    s->dscores = carve(&next, square), s->dscores_pairs = carve(&next, pairs);
    s->dk_sums = carve(&next, sums), s->dv_sums = carve(&next, sums);
    s->scores = carve(&next, strip), s->dprobs = carve(&next, strip), s->cap_slopes = carve(&next, strip);
    return next - workspace;
}

// Bytes of workspace that a thread needs for a segment of so many rows that sees so many tokens of the prefix.
index_t varlen_attention_workspace(index_t rows, index_t prefix, index_t head_dim, index_t backward) {
    index_t columns = round_up(rows + prefix, NR);
    ForwardSpace forward_space;
    BackwardSpace backward_space;
    return backward ? carve_backward(NULL, rows, columns, head_dim, &backward_space)
                    : carve_forward(NULL, columns, head_dim, &forward_space);
}

// --- rows of the pack, gathered and packed

// `count` rows of this head size, `row_stride` apart, become neighbours, and zeros follow up to `padded` rows.
static void gather(const scalar_t *from, scalar_t *to, index_t count, index_t padded, index_t row_stride,
                   index_t head_dim) {
    for (index_t i = 0; i < count; i++) memcpy(to + i * head_dim, from + i * row_stride, head_dim * sizeof(scalar_t));
    memset(to + count * head_dim, 0, (padded - count) * head_dim * sizeof(scalar_t));
}

// The keys or values that a task sees, (columns, head_dim), of those of the pack, (tokens, num_kv_heads, head_dim).
static void gather_visible(const Task *t, const scalar_t *pack, scalar_t *to) {
    index_t row_stride = t->num_kv_heads * t->head_dim;
    const scalar_t *from = pack + t->kv_head * t->head_dim;
    gather(from, to, t->prefix, t->prefix, row_stride, t->head_dim);
    gather(from + t->start * row_stride, to + t->prefix * t->head_dim, t->rows, t->columns - t->prefix, row_stride,
           t->head_dim);
}

// Rows (count, head_dim), packed for products with rows of `head_dim`: their transpose is the weight.
static void pack_transposed(const scalar_t *rows, scalar_t *to, index_t count, index_t head_dim) {
    for (index_t at = 0; at < count; at += NR) pack_b(rows, to + at * head_dim, head_dim, count, at, 1);
}

// The same packed for products with rows of `count`.
static void pack_rows(const scalar_t *rows, scalar_t *to, index_t count, index_t head_dim) {
    for (index_t at = 0; at < head_dim; at += NR) pack_b(rows, to + at * count, count, head_dim, at, 0);
}

// Rows of columns, up to `end`, become pairs of rows: (rows / 2, columns, 2).
static void interleave_rows(const scalar_t *from, scalar_t *to, index_t rows, index_t columns, index_t end) {
    for (index_t row = 0; row < rows; row += 2)
        for (index_t at = 0; at < end; at += NR) {
            const scalar_t *first = from + row * columns + at;
            __m512i second = _mm512_loadu_si512(first + columns);
            interleave(_mm512_loadu_si512(first), second, to + row * columns + 2 * at, 32);
        }
}

// --- the products of a row tile

// A row tile (MR, head_dim) times the columns from `first` to `last` of what was packed transposed.
static inline __attribute__((always_inline)) void tile_scores(const Task *t, const scalar_t *x,
                                                              const scalar_t *transposed, index_t first, index_t last,
                                                              float *to) {
    for (index_t at = first; at < last; at += NR) {
        __m512 sums[MR][2];
        tile_zero(sums, MR);
        tile_multiply(x, t->head_dim, 2, transposed + at * t->head_dim, 16 * t->head_dim, t->head_dim / 2, sums, MR);
#pragma GCC unroll 14
        for (index_t i = 0; i < MR; i++)
#pragma GCC unroll 2
            for (index_t block = 0; block < 2; block++)
                _mm512_storeu_ps(to + i * t->columns + at + 16 * block, sums[i][block]);
    }
}

// A row tile of columns, from `first` to `last`, times packed rows, each row of it times its factor; `count` rows are
// written, `row_stride` apart.
static inline __attribute__((always_inline)) void tile_values(const Task *t, const scalar_t *tile,
                                                              const scalar_t *packed_rows, index_t first, index_t last,
                                                              const float *factors, scalar_t *to, index_t count,
                                                              index_t row_stride) {
    scalar_t rounded[MR * NR];
    for (index_t at = 0; at < t->head_dim; at += NR) {
        __m512 sums[MR][2];
        tile_zero(sums, MR);
        tile_multiply(tile + first, t->columns, 2, packed_rows + at * t->columns + 16 * first, 16 * t->columns,
                      (last - first) / 2, sums, MR);
#pragma GCC unroll 14
        for (index_t i = 0; i < MR; i++)
#pragma GCC unroll 2
            for (index_t block = 0; block < 2; block++) sums[i][block] *= factors[i];
        tile_store(sums, rounded, NR);
        for (index_t i = 0; i < count; i++)
            memcpy(to + i * row_stride + at, rounded + NR * i, NR * sizeof(scalar_t));
    }
}

// sums (columns, head_dim) += the transpose of MR columns, from `column` on, of interleaved rows, times packed rows,
// from row `first` on.
static void tile_add_transposed(const Task *t, const scalar_t *row_pairs, const scalar_t *packed_rows, index_t rows,
                                index_t column, index_t first, float *sums) {
    index_t pair = first / 2;
    for (index_t at = 0; at < t->head_dim; at += NR) {
        __m512 tile[MR][2];
        float *to = sums + column * t->head_dim + at;
#pragma GCC unroll 14
        for (index_t i = 0; i < MR; i++)
#pragma GCC unroll 2
            for (index_t block = 0; block < 2; block++)
                tile[i][block] = _mm512_loadu_ps(to + i * t->head_dim + 16 * block);
        tile_multiply(row_pairs + 2 * (pair * t->columns + column), 2, 2 * t->columns,
                      packed_rows + at * rows + 32 * pair, 16 * rows, rows / 2 - pair, tile, MR);
#pragma GCC unroll 14
        for (index_t i = 0; i < MR; i++)
#pragma GCC unroll 2
            for (index_t block = 0; block < 2; block++)
                _mm512_storeu_ps(to + i * t->head_dim + 16 * block, tile[i][block]);
    }
}

// --- forward and backward

// The cap and the linear bias of a row's scores, which are not scaled yet, from `start` to `end`, the last of them the
// row's own place. `cap_slopes`: the derivative of each capped score, NULL where nobody asks.
static inline void bias_scores(const Task *t, float *scores, index_t start, index_t end, float *cap_slopes) {
    if (t->softcap) {
        float to_cap = t->scale / t->softcap;
#pragma omp simd
        for (index_t j = start; j < end; j++) scores[j] = tanh_f32(scores[j] * to_cap);
        if (cap_slopes)
#pragma omp simd
            for (index_t j = start; j < end; j++) cap_slopes[j] = 1.0f - scores[j] * scores[j];
#pragma omp simd
        for (index_t j = start; j < end; j++) scores[j] *= t->softcap / t->scale;
    }
    if (t->slope) {
        float slope = t->slope / t->scale;
#pragma omp simd
        for (index_t j = start; j < end; j++) scores[j] += slope * (float)(j + 1 - end);
    }
}

// query, out: (tokens, num_heads, head_dim); key, value: (tokens, num_kv_heads, head_dim); head_dim a multiple of 32;
// cu_seqlens: (segments + 1,), int32, where segments begin and end, the first of them the shared prefix, of `prefix`
// tokens; lse: (tokens, num_heads), float32; slopes: (num_heads,), float32, or NULL: ALiBi; workspace: num_threads *
// thread_bytes; window, softcap: 0 for none.
void varlen_attention(const scalar_t *query, const scalar_t *key, const scalar_t *value, const int32_t *cu_seqlens,
                      scalar_t *out, float *lse, const float *slopes, char *workspace, index_t thread_bytes,
                      index_t num_threads, index_t segments, index_t prefix, index_t num_heads, index_t num_kv_heads,
                      index_t head_dim, index_t window, float scale, float softcap) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
    for (index_t number = 0; number < segments * num_heads; number++) {
        Task t = task_of(number, cu_seqlens, prefix, num_heads, num_kv_heads, head_dim, scale, window, slopes, softcap);
        index_t row_stride = num_heads * head_dim;
        ForwardSpace s;
        carve_forward(workspace + omp_get_thread_num() * thread_bytes, t.columns, head_dim, &s);
        gather_visible(&t, key, s.gathered);
        pack_transposed(s.gathered, s.k_packed, t.columns, head_dim);
        gather_visible(&t, value, s.gathered);
        pack_rows(s.gathered, s.v_packed, t.columns, head_dim);
        for (index_t row = 0; row < t.rows; row += MR) {
            index_t count = min_index(t.rows - row, MR), at = (t.start + row) * row_stride + t.head * head_dim;
            index_t first = first_visible(&t, row) / NR * NR, last = round_up(t.prefix + row + count, NR);
            float factors[MR] = {0};
            gather(query + at, s.q_tile, count, MR, row_stride, head_dim);
            tile_scores(&t, s.q_tile, s.k_packed, first, last, s.scores);
            memset(s.probs, 0, MR * t.columns * sizeof(scalar_t)); // what a row does not see weighs nothing
            for (index_t i = 0; i < count; i++) {
                float *scores = s.scores + i * t.columns;
                scalar_t *probs = s.probs + i * t.columns;
                index_t start = first_visible(&t, row + i), end = t.prefix + row + i + 1;
                float largest = -INFINITY, sum = 0;
                bias_scores(&t, scores, start, end, NULL);
#pragma omp simd reduction(max : largest)
                for (index_t j = start; j < end; j++) largest = max_f32(largest, scores[j]);
#pragma omp simd reduction(+ : sum)
                for (index_t j = start; j < end; j++) {
                    float p = exp_f32((scores[j] - largest) * scale);
                    sum += p;
                    probs[j] = from_float(p);
                }
                factors[i] = 1.0f / sum; // the division comes after the product, on head_dim entries
                lse[(t.start + row + i) * num_heads + t.head] = largest * scale + logf(sum);
            }
            tile_values(&t, s.probs, s.v_packed, first, last, factors, out + at, count, row_stride);
        }
    }
}

// Softmax and its gradient for `count` rows from `row` on, whose row `bank_row` in the bank it is: scores and dprobs of
// a row tile become probs and dscores = probs * (dprobs - sum of probs * dprobs), which are rounded.
static inline void tile_softmax_backward(const Task *t, const BackwardSpace *s, index_t row, index_t bank_row,
                                         index_t count, const float *lse) {
    for (index_t i = 0; i < count; i++) {
        index_t start = first_visible(t, row + i), end = t->prefix + row + i + 1;
        float *p = s->scores + i * t->columns, *dp = s->dprobs + i * t->columns, mean = 0;
        float row_lse = lse[(t->start + row + i) * t->num_heads + t->head];
        scalar_t *probs = s->probs + (bank_row + i) * t->columns, *dscores = s->dscores + (bank_row + i) * t->columns;
        bias_scores(t, p, start, end, s->cap_slopes);
#pragma omp simd reduction(+ : mean)
        for (index_t j = start; j < end; j++) {
            p[j] = exp_f32(p[j] * t->scale - row_lse);
            mean += p[j] * dp[j];
        }
#pragma omp simd
        for (index_t j = start; j < end; j++) {
            probs[j] = from_float(p[j]);
            dscores[j] = from_float(p[j] * (dp[j] - mean));
        }
        if (t->softcap)
#pragma omp simd
            for (index_t j = start; j < end; j++)
                dscores[j] = from_float(p[j] * (dp[j] - mean) * s->cap_slopes[j]);
    }
}

// The gradients of `varlen_attention`; those of keys and values for each of the num_heads, to be added up by the
// caller. grad, query, d_query, d_key, d_value: (tokens, num_heads, head_dim); key, value: (tokens, num_kv_heads,
// head_dim); lse: (tokens, num_heads), float32; prefix_d_key, prefix_d_value: (segments, prefix, num_heads, head_dim),
// each segment's share of the gradients of the prefix. The others as above.
void varlen_attention_backward(const scalar_t *grad, const scalar_t *query, const scalar_t *key, const scalar_t *value,
                               const int32_t *cu_seqlens, const float *lse, scalar_t *d_query, scalar_t *d_key,
                               scalar_t *d_value, scalar_t *prefix_d_key, scalar_t *prefix_d_value,
                               const float *slopes, char *workspace, index_t thread_bytes, index_t num_threads,
                               index_t segments, index_t prefix, index_t num_heads, index_t num_kv_heads,
                               index_t head_dim, index_t window, float scale, float softcap) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
    for (index_t number = 0; number < segments * num_heads; number++) {
        Task t = task_of(number, cu_seqlens, prefix, num_heads, num_kv_heads, head_dim, scale, window, slopes, softcap);
        index_t row_stride = num_heads * head_dim, sums_bytes = (t.columns + MR) * head_dim * sizeof(float);
        float factors[MR];
        for (index_t i = 0; i < MR; i++) factors[i] = scale;
        BackwardSpace s;
        carve_backward(workspace + omp_get_thread_num() * thread_bytes, t.rows, t.columns, head_dim, &s);
        memset(s.dk_sums, 0, sums_bytes);
        memset(s.dv_sums, 0, sums_bytes);
        gather_visible(&t, key, s.gathered);
        pack_transposed(s.gathered, s.k_packed, t.columns, head_dim);
        pack_rows(s.gathered, s.k_rows_packed, t.columns, head_dim);
        gather_visible(&t, value, s.gathered);
        pack_transposed(s.gathered, s.v_packed, t.columns, head_dim);
        // A bank of rows at a time: the gradients of keys and values are sums over rows, and need their probabilities
        // beside each other, but all of a long segment's would be its length squared.
        for (index_t bank = 0; bank < t.rows; bank += ROW_BANK) {
            index_t bank_rows = min_index(t.rows - bank, ROW_BANK), padded = round_up(bank_rows, MR);
            index_t at = (t.start + bank) * row_stride + t.head * head_dim, visible_end = t.prefix + bank + bank_rows;
            gather(query + at, s.q_tile, bank_rows, padded, row_stride, head_dim);
            gather(grad + at, s.do_tile, bank_rows, padded, row_stride, head_dim);
            memset(s.probs, 0, padded * t.columns * sizeof(scalar_t));
            memset(s.dscores, 0, padded * t.columns * sizeof(scalar_t));
            for (index_t row = 0; row < bank_rows; row += MR) {
                index_t count = min_index(bank_rows - row, MR);
                index_t first = first_visible(&t, bank + row) / NR * NR;
                index_t last = round_up(t.prefix + bank + row + count, NR);
                tile_scores(&t, s.q_tile + row * head_dim, s.k_packed, first, last, s.scores);
                tile_scores(&t, s.do_tile + row * head_dim, s.v_packed, first, last, s.dprobs);
                tile_softmax_backward(&t, &s, bank + row, row, count, lse);
                tile_values(&t, s.dscores + row * t.columns, s.k_rows_packed, first, last, factors,
                            d_query + at + row * row_stride, count, row_stride);
            }
            // MR columns may begin before the last that is visible and reach over the next column tile.
            index_t end = min_index(round_up(visible_end, NR) + NR, t.columns);
            interleave_rows(s.probs, s.probs_pairs, padded, t.columns, end);
            interleave_rows(s.dscores, s.dscores_pairs, padded, t.columns, end);
            pack_rows(s.do_tile, s.do_packed, padded, head_dim);
            pack_rows(s.q_tile, s.q_packed, padded, head_dim);
            for (index_t column = 0; column < visible_end; column += MR) {
                index_t seen_before = t.prefix + bank;
                index_t first = column > seen_before ? column - seen_before : 0; // the first row that sees one of them
                tile_add_transposed(&t, s.probs_pairs, s.do_packed, padded, column, first, s.dv_sums);
                tile_add_transposed(&t, s.dscores_pairs, s.q_packed, padded, column, first, s.dk_sums);
            }
        }
        for (index_t i = 0; i < t.prefix + t.rows; i++) {
            index_t row = i - t.prefix, token = row < 0 ? t.segment * t.prefix + i : t.start + row;
            index_t at = token * row_stride + t.head * head_dim;
            scalar_t *to_key = (row < 0 ? prefix_d_key : d_key) + at;
            scalar_t *to_value = (row < 0 ? prefix_d_value : d_value) + at;
#pragma omp simd
            for (index_t j = 0; j < head_dim; j++) {
                to_key[j] = from_float(s.dk_sums[i * head_dim + j] * scale);
                to_value[j] = from_float(s.dv_sums[i * head_dim + j]);
            }
        }
    }
}
