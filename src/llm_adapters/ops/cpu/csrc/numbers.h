// Numbers as they are in memory, and what all kernels do with them.

#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(BFLOAT16) && defined(__AVX512BF16__)
#define VNNI // the processor multiplies pairs of bfloat16: _mm512_dpbf16_ps
#include <immintrin.h>
#endif

// scalar_t is the precision of tensors; all arithmetic is float32.
#ifdef BFLOAT16
typedef uint16_t scalar_t;

static inline float to_float(scalar_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline scalar_t from_float(float value) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (scalar_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#else
typedef float scalar_t;

static inline float to_float(scalar_t x) { return x; }

static inline scalar_t from_float(float value) { return value; }
#endif

typedef int64_t index_t;

static inline float min_f32(float x, float y) { return x < y ? x : y; }

static inline float max_f32(float x, float y) { return x > y ? x : y; }

static inline index_t min_index(index_t x, index_t y) { return x < y ? x : y; }

static inline index_t round_up(index_t count, index_t step) { return (count + step - 1) / step * step; }

// exp, to float32's precision: exp(x) = 2^n exp(r) with |r| <= ln(2) / 2, and a Taylor polynomial for exp(r). Written
// out because the C library's is a call, which loops over vectors cannot have.
static inline float exp_f32(float x) {
    x = max_f32(-87.0f, min_f32(88.0f, x)); // in this order NaN stays what it is
    float n = __builtin_rintf(x * 1.44269504f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; // ln(2) in two parts, so that r loses no digits
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23; // 2^n by its exponent
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

// tanh, to float32's precision: by exp, and near 0, where that loses digits, by its Taylor polynomial.
static inline float tanh_f32(float x) {
    float z = x * x, p = 62.0f / 2835;
    p = p * z - 17.0f / 315;
    p = p * z + 2.0f / 15;
    p = p * z - 1.0f / 3;
    float near_0 = x + x * (z * p), far = 1.0f - 2.0f / (exp_f32(2.0f * x) + 1.0f);
    return z < 0.0625f ? near_0 : far;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exp_f32(-x)); }

// 1 if dropout keeps entry i: a hash of i, MurmurHash3's last mixing step with a seed before and within it, is at least
// the threshold p * 2^32. `ops/dropout.py` has the same in torch.
static inline int keep_mask(uint32_t i, uint64_t seed, uint32_t threshold) {
    uint32_t h = i + (uint32_t)seed;
    h ^= h >> 16;
    h *= 0x85ebca6b;
    h ^= (uint32_t)(seed >> 32);
    h ^= h >> 13;
    h *= 0xc2b2ae35;
    return (h ^ (h >> 16)) >= threshold;
}

typedef float f32x16 __attribute__((vector_size(64)));

// 32 neighbours: in bfloat16 those with even numbers and those with odd ones, as that takes one instruction each.
static inline void load_32(const scalar_t *from, f32x16 *first, f32x16 *second) {
#ifdef BFLOAT16
    typedef uint32_t u32x16 __attribute__((vector_size(64)));
    u32x16 pairs;
    memcpy(&pairs, from, 64);
    *first = (f32x16)(pairs << 16);
    *second = (f32x16)(pairs & 0xffff0000);
#else
    memcpy(first, from, 64);
    memcpy(second, from + 16, 64);
#endif
}

// 16 neighbours in their order, or as many as there are, then zeros.
static inline f32x16 load_16(const scalar_t *from, index_t count) {
    scalar_t padded[16] = {0};
    if (count < 16) {
        for (index_t i = 0; i < count; i++) padded[i] = from[i];
        from = padded;
    }
    float values[16];
#pragma omp simd
    for (index_t i = 0; i < 16; i++) values[i] = to_float(from[i]);
    f32x16 vector;
    memcpy(&vector, values, 64);
    return vector;
}

// The first `count` of 16 values, rounded.
static inline void store_16(f32x16 vector, scalar_t *to, index_t count) {
    float values[16];
    scalar_t rounded[16];
    memcpy(values, &vector, 64);
#pragma omp simd
    for (index_t i = 0; i < 16; i++) rounded[i] = from_float(values[i]);
    if (count >= 16) memcpy(to, rounded, sizeof rounded);
    else
        for (index_t i = 0; i < count; i++) to[i] = rounded[i];
}
