// What goes row by row or entry by entry.

#include "numbers.h"

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
        if (out) out[i] = put(get(put(x * s)) * u);
    }
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
