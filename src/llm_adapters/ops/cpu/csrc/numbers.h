// Numbers as they lie in memory, and what all kernels do with them.

#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(BFLOAT16) && defined(__AVX512BF16__)
#define PAIRS // the processor multiplies pairs of bfloat16
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
    x = most(-87.0f, least(88.0f, x)); // in this order NaN stays what it is
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
