// Products of many rows with frozen weights, and a LoRA on them.

#include "numbers.h"
#include <omp.h>

#define STRIP 14 // rows at a time: with 32 columns as many sums as registers can hold
#define FEW 8    // ranks at a time, a divisor of 32

typedef uint32_t Words __attribute__((vector_size(64)));

Int strip_rows(void) { return STRIP; }

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
        if (parts > strips) parts = strips;
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
                for (Int at = 0; at < rank; at += FEW) {
                    __m512 sums[FEW][2];
                    clear(sums, FEW);
                    strip(pairs + 2 * at, 2, 2 * rank, own, 16 * even, even / 2, sums, FEW);
                    for (Int row = 0; row < FEW; row++)
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
