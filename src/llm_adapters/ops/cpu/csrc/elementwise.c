// Operators that go row by row or entry by entry: norm, SwiGLU, dropout, rotary positions, softmax, cross-entropy.

#include "numbers.h"

#define BLOCK 4096 // entries that a thread takes at a time

// A parallel loop over `count` entries, whose body sees their number i.
#define FOR_EACH_ENTRY(count)                                                                                          \
    _Pragma("omp parallel for schedule(static)") for (index_t first = 0; first < (count); first += BLOCK)              \
        _Pragma("omp simd") for (index_t i = first; i < (first + BLOCK < (count) ? first + BLOCK : (count)); i++)

// out = weight * x / rms(x)
// x, out: (rows, hidden_size); weight: (hidden_size,); inverse_rms: (rows,), float32, for the backward pass.
void rms_norm(const scalar_t *x, const scalar_t *weight, scalar_t *out, float *inverse_rms, index_t rows,
              index_t hidden_size, float eps) {
#pragma omp parallel for schedule(static)
    for (index_t row = 0; row < rows; row++) {
        const scalar_t *x_row = x + row * hidden_size;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (index_t i = 0; i < hidden_size; i++) squares += to_float(x_row[i]) * to_float(x_row[i]);
        float factor = 1.0f / sqrtf(squares / hidden_size + eps);
        inverse_rms[row] = factor;
#pragma omp simd
        for (index_t i = 0; i < hidden_size; i++) // rounded before the weight, as transformers' norms do
            out[row * hidden_size + i] =
                from_float(to_float(from_float(to_float(x_row[i]) * factor)) * to_float(weight[i]));
    }
}

// d_x, from the norm's result, which the next layer keeps anyway, and not from x.
// grad, result, d_x: (rows, hidden_size); weight: (hidden_size,), nowhere 0; inverse_rms: (rows,), float32.
void rms_norm_backward(const scalar_t *grad, const scalar_t *result, const scalar_t *weight, const float *inverse_rms,
                       scalar_t *d_x, index_t rows, index_t hidden_size) {
#pragma omp parallel for schedule(static)
    for (index_t row = 0; row < rows; row++) {
        const scalar_t *g = grad + row * hidden_size, *y = result + row * hidden_size;
        float mean = 0, factor = inverse_rms[row];
#pragma omp simd reduction(+ : mean)
        for (index_t i = 0; i < hidden_size; i++) mean += to_float(g[i]) * to_float(y[i]);
        mean /= hidden_size;
#pragma omp simd
        for (index_t i = 0; i < hidden_size; i++) {
            float w = to_float(weight[i]);
            d_x[row * hidden_size + i] = from_float(factor * (to_float(g[i]) * w - to_float(y[i]) / w * mean));
        }
    }
}

// out = silu(gate) * up; all (count,).
void swiglu(const scalar_t *gate, const scalar_t *up, scalar_t *out, index_t count) {
    FOR_EACH_ENTRY(count) {
        float x = to_float(gate[i]);
        out[i] = from_float(to_float(from_float(x * sigmoid(x))) * to_float(up[i]));
    }
}

// d_gate and d_up, and the result again in `out`, which may be NULL; all (count,).
void swiglu_backward(const scalar_t *grad, const scalar_t *gate, const scalar_t *up, scalar_t *d_gate, scalar_t *d_up,
                     scalar_t *out, index_t count) {
    FOR_EACH_ENTRY(count) {
        float x = to_float(gate[i]), s = sigmoid(x), g = to_float(grad[i]), u = to_float(up[i]);
        d_up[i] = from_float(g * x * s);
        d_gate[i] = from_float(g * u * (s + x * s * (1.0f - s)));
        if (out) out[i] = from_float(to_float(from_float(x * s)) * u);
    }
}

// out = scale * x where `keep_mask`, else 0; both (count,).
void dropout(const scalar_t *x, scalar_t *out, index_t count, uint64_t seed, uint32_t threshold, float scale) {
    if (scale == 1.0f)
        FOR_EACH_ENTRY(count) out[i] = keep_mask((uint32_t)i, seed, threshold) ? x[i] : 0;
    else
        FOR_EACH_ENTRY(count)
            out[i] = keep_mask((uint32_t)i, seed, threshold) ? from_float(to_float(x[i]) * scale) : 0;
}

// out += x where `keep_mask`; both (count,).
void dropout_add(scalar_t *out, const scalar_t *x, index_t count, uint64_t seed, uint32_t threshold) {
    FOR_EACH_ENTRY(count)
        out[i] = keep_mask((uint32_t)i, seed, threshold) ? from_float(to_float(out[i]) + to_float(x[i])) : out[i];
}

// Rotary positions: the two halves of each head, (a, b) -> (a cos - b sin, b cos + a sin); with `backward` the
// transpose. x, out: (tokens, num_heads, head_dim); cos, sin: (tokens, head_dim).
void rotary(const scalar_t *x, const scalar_t *cos, const scalar_t *sin, scalar_t *out, index_t tokens,
            index_t num_heads, index_t head_dim, index_t backward) {
    index_t half = head_dim / 2;
#pragma omp parallel for schedule(static)
    for (index_t token = 0; token < tokens; token++) {
        const scalar_t *c = cos + token * head_dim, *s = sin + token * head_dim;
        for (index_t head = 0; head < num_heads; head++) {
            const scalar_t *a = x + (token * num_heads + head) * head_dim, *b = a + half;
            scalar_t *to = out + (token * num_heads + head) * head_dim;
            if (backward) {
#pragma omp simd
                for (index_t i = 0; i < half; i++) {
                    to[i] = from_float(to_float(a[i]) * to_float(c[i]) + to_float(b[i]) * to_float(s[half + i]));
                    to[half + i] =
                        from_float(to_float(b[i]) * to_float(c[half + i]) - to_float(a[i]) * to_float(s[i]));
                }
            } else {
#pragma omp simd
                for (index_t i = 0; i < half; i++) {
                    to[i] = from_float(to_float(a[i]) * to_float(c[i]) - to_float(b[i]) * to_float(s[i]));
                    to[half + i] =
                        from_float(to_float(b[i]) * to_float(c[half + i]) + to_float(a[i]) * to_float(s[half + i]));
                }
            }
        }
    }
}

// A score with its cap and its linear bias, 0 for none of them; `distance` is that from the row's own place, 0 or less.
static inline __attribute__((always_inline)) float biased_score(float score, index_t distance, float slope,
                                                                float softcap) {
    if (softcap) score = softcap * tanh_f32(score / softcap);
    return slope ? score + slope * (float)distance : score;
}

// Softmax of the entries from `start` to `end`, the last of which is the row's own place.
static inline __attribute__((always_inline)) void softmax_row(scalar_t *values, index_t start, index_t end, float slope,
                                                              float softcap) {
    float largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
    for (index_t i = start; i < end; i++)
        largest = max_f32(largest, biased_score(to_float(values[i]), i + 1 - end, slope, softcap));
#pragma omp simd reduction(+ : sum)
    for (index_t i = start; i < end; i++)
        sum += exp_f32(biased_score(to_float(values[i]), i + 1 - end, slope, softcap) - largest);
    float factor = 1.0f / sum;
#pragma omp simd
    for (index_t i = start; i < end; i++)
        values[i] = from_float(
            exp_f32(biased_score(to_float(values[i]), i + 1 - end, slope, softcap) - largest) * factor);
}

// Softmax of attention scores of padded segments over what each row may see, in place; zeros elsewhere.
// scores: (segments, num_heads, rows, columns), the rows from `first_row` of each segment on, the columns the shared
// prefix and then the segment's own tokens; lengths: (segments,); slopes: (num_heads,), float32, or NULL: ALiBi; window,
// softcap: 0 for none.
void masked_softmax(scalar_t *scores, const index_t *lengths, const float *slopes, index_t segments, index_t num_heads,
                    index_t rows, index_t columns, index_t prefix, index_t first_row, index_t window, float softcap) {
#pragma omp parallel for schedule(static)
    for (index_t line = 0; line < segments * num_heads * rows; line++) {
        scalar_t *values = scores + line * columns;
        index_t position = first_row + line % rows, end = prefix + position + 1;
        if (position >= lengths[line / rows / num_heads]) end = 0;  // padding sees nothing
        index_t start = window && end > window ? end - window : 0;
        memset(values, 0, start * sizeof(scalar_t));
        memset(values + end, 0, (columns - end) * sizeof(scalar_t));
        if (!slopes && !softcap) softmax_row(values, start, end, 0, 0);  // constants, which cost nothing
        else softmax_row(values, start, end, slopes ? slopes[line / rows % num_heads] : 0, softcap);
    }
}

// The gradient of a softmax, in place of `grad`; grad, probs: (rows, columns).
void softmax_backward(scalar_t *grad, const scalar_t *probs, index_t rows, index_t columns) {
#pragma omp parallel for schedule(static)
    for (index_t row = 0; row < rows; row++) {
        scalar_t *g = grad + row * columns;
        const scalar_t *p = probs + row * columns;
        float mean = 0;
#pragma omp simd reduction(+ : mean)
        for (index_t i = 0; i < columns; i++) mean += to_float(g[i]) * to_float(p[i]);
#pragma omp simd
        for (index_t i = 0; i < columns; i++) g[i] = from_float(to_float(p[i]) * (to_float(g[i]) - mean));
    }
}

// The cross-entropy of each row; the logits become its gradient, softmax(logits) - one_hot(target).
// logits: (rows, vocab_size); targets: (rows,), within the vocabulary or negative, which is ignored; losses: (rows,),
// float32.
void cross_entropy(scalar_t *logits, const index_t *targets, float *losses, index_t rows, index_t vocab_size) {
#pragma omp parallel for schedule(static)
    for (index_t row = 0; row < rows; row++) {
        scalar_t *values = logits + row * vocab_size;
        if (targets[row] < 0) { // ignored
            memset(values, 0, vocab_size * sizeof(scalar_t));
            losses[row] = 0;
            continue;
        }
        float at_target = to_float(values[targets[row]]), largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
        for (index_t i = 0; i < vocab_size; i++) largest = max_f32(largest, to_float(values[i]));
#pragma omp simd reduction(+ : sum)
        for (index_t i = 0; i < vocab_size; i++) sum += exp_f32(to_float(values[i]) - largest);
        // The target's own gradient is rounded once, after the subtraction.
        float factor = 1.0f / sum, target_grad = exp_f32(at_target - largest) * factor - 1.0f;
#pragma omp simd
        for (index_t i = 0; i < vocab_size; i++)
            values[i] = from_float(exp_f32(to_float(values[i]) - largest) * factor);
        values[targets[row]] = from_float(target_grad);
        losses[row] = logf(sum) + largest - at_target;
    }
}
