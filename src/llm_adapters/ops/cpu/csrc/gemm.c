// Matrix products (GEMM) of many rows with frozen weights, a LoRA in the same pass, and its weights' gradients.
//
// A product is computed in tiles of MR x NR = 14 x 32 float32 sums, which stay in registers while the inner dimension
// is gone through, a pair of entries at a time (k and k + 1):
//
//                        packed weight, one column tile         each 64 bytes: 16 columns of rows k and k + 1,
//                     [ columns 0..15 ][ columns 16..31 ]       interleaved (VNNI, see lora.c)
//                              |               |
//     x  row  0: k k+1 --> [ sums 0, 0 ]   [ sums 0, 1 ]        a pair of x is broadcast to all 16 columns;
//        row  1: k k+1 --> [ sums 1, 0 ]   [ sums 1, 1 ]        28 sums, 2 of weights, 1 of x: 31 of 32 registers
//        ...                    ...             ...
//        row 13: k k+1 --> [ sums 13, 0]   [ sums 13, 1]
//
// Each thread packs a column tile of the weight for itself, (in_features, 32), which stays in its second cache while
// all row tiles go by. The order of sums depends on neither the number of threads nor on that of rows.

#include "numbers.h"
#include <omp.h>

#define MR 14   // rows of a tile
#define NR 32   // columns of a tile
#define FEW 8   // rows of a tile for the gradients, a divisor of 32, the unit of ranks

typedef uint32_t u32x16 __attribute__((vector_size(64)));

// How many rows a tile has: callers pad the rows of `lora_hidden` to a multiple.
index_t row_tile(void) { return MR; }

// sums += rows of x times a column tile of packed weights, whose two blocks are `block_stride` entries apart. From pair
// to pair of a row of x it is `pair_stride` entries, and to the next row `row_stride`.
static inline __attribute__((always_inline)) void tile_multiply(const scalar_t *x, index_t row_stride,
                                                                index_t pair_stride, const scalar_t *weights,
                                                                index_t block_stride, index_t pairs, __m512 sums[][2],
                                                                const index_t rows) {
    for (index_t i = 0; i < pairs; i++) {
        __m512bh first = (__m512bh)_mm512_loadu_si512(weights + 32 * i);
        __m512bh second = (__m512bh)_mm512_loadu_si512(weights + block_stride + 32 * i);
#pragma GCC unroll 14
        for (index_t row = 0; row < rows; row++) {
            int pair;
            memcpy(&pair, x + row * row_stride + i * pair_stride, 4);
            __m512bh broadcast = (__m512bh)_mm512_set1_epi32(pair);
            sums[row][0] = _mm512_dpbf16_ps(sums[row][0], first, broadcast);
            sums[row][1] = _mm512_dpbf16_ps(sums[row][1], second, broadcast);
        }
    }
}

static inline __attribute__((always_inline)) void tile_zero(__m512 sums[][2], const index_t rows) {
#pragma GCC unroll 14
    for (index_t row = 0; row < rows; row++) sums[row][0] = sums[row][1] = _mm512_setzero_ps();
}

static inline __attribute__((always_inline)) void tile_store(__m512 sums[MR][2], scalar_t *to, index_t row_stride) {
#pragma GCC unroll 14
    for (index_t row = 0; row < MR; row++)
#pragma GCC unroll 2
        for (index_t block = 0; block < 2; block++)
            _mm256_storeu_si256((__m256i *)(to + row * row_stride + 16 * block),
                                (__m256i)_mm512_cvtneps_pbh(sums[row][block]));
}

// `keep_mask` for 16 neighbours: all bits of an entry or none.
static inline u32x16 keep_mask_16(uint32_t first, uint64_t seed, uint32_t threshold) {
    const u32x16 count = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    u32x16 h = count + (first + (uint32_t)seed);
    h ^= h >> 16;
    h *= 0x85ebca6b;
    h ^= (uint32_t)(seed >> 32);
    h ^= h >> 13;
    h *= 0xc2b2ae35;
    return (u32x16)((h ^ (h >> 16)) >= threshold);
}

// For 32 neighbours, a bit each.
static inline __mmask32 keep_bits_32(uint32_t first, uint64_t seed, uint32_t threshold) {
    __mmask16 low = _mm512_movepi32_mask((__m512i)keep_mask_16(first, seed, threshold));
    return low | (__mmask32)_mm512_movepi32_mask((__m512i)keep_mask_16(first + 16, seed, threshold)) << 16;
}

// 16 rows of 16 pairs, `row_stride` entries apart, become 16 rows of those pairs' columns: a 16 x 16 transpose of
// 32-bit words, in four steps that each double the size of the blocks in their place.
static inline void transpose(const scalar_t *from, index_t row_stride, scalar_t *to) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (index_t i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * row_stride);
#pragma GCC unroll 8
    for (index_t i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (index_t i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (index_t j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
#pragma GCC unroll 4
    for (index_t i = 0; i < 4; i++) {
        __m512i even_low = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        __m512i odd_low = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        __m512i even_high = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        __m512i odd_high = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
        _mm512_storeu_si512(to + 32 * i, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
        _mm512_storeu_si512(to + 32 * (i + 4), _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
        _mm512_storeu_si512(to + 32 * (i + 8), _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
        _mm512_storeu_si512(to + 32 * (i + 12), _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
    }
}

// Two rows of 32 neighbours become pairs, of the first 16 and, `block_stride` entries on, of the others.
static inline void interleave(const __m512i first, const __m512i second, scalar_t *to, index_t block_stride) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(first, low, second));
    _mm512_storeu_si512(to + block_stride, _mm512_permutex2var_epi16(first, high, second));
}

// The column tile that begins at `column` of a matrix (in_features, out_features), or if `transposed` (out_features,
// in_features), in the order in which `tile_multiply` reads it.
static void pack_b(const scalar_t *weight, scalar_t *to, index_t in_features, index_t out_features, index_t column,
                   index_t transposed) {
    if (transposed) // pairs are neighbours already, and change places as one word
        for (index_t block = 0; block < 2; block++)
            for (index_t i = 0; i < in_features; i += 32)
                transpose(weight + (column + 16 * block) * in_features + i, in_features,
                          to + 16 * (block * in_features + i));
    else
        for (index_t i = 0; i < in_features; i += 2) {
            const scalar_t *from = weight + i * out_features + column;
            interleave(_mm512_loadu_si512(from), _mm512_loadu_si512(from + out_features), to + 16 * i,
                       16 * in_features);
        }
}

// What dropout does to a LoRA: nothing, to what goes in (forward), to what is added in the end (backward).
enum { DROP_NOTHING, DROP_INPUT, DROP_OUTPUT };

// out = x weight + bias + (x A) B. All sizes but `rows` are multiples of 32.
// x: (rows, in_features); weight: (in_features, out_features), or if `transposed` (out_features, in_features);
// bias: (out_features,) or NULL; out: (rows, out_features);
// a: (in_features, rank), b: (rank, out_features), both packed (see lora.c); lora_hidden: (rows up to a multiple of MR,
// rank), which gets x A; without a LoRA these are NULL and rank is 0. seed, threshold: see `keep_mask`.
void linear(const scalar_t *x, const scalar_t *weight, const scalar_t *bias, scalar_t *out, const scalar_t *a,
            const scalar_t *b, scalar_t *lora_hidden, index_t rows, index_t in_features, index_t out_features,
            index_t rank, index_t transposed, uint64_t seed, uint32_t threshold, index_t drops) {
    index_t column_tiles = out_features / NR, full_rows = rows / MR * MR, rest = rows - full_rows;
#pragma omp parallel
    {
        // The last rows, with zeros up to a tile; rows with dropout; this thread's column tile; the last rows' results.
        scalar_t last_rows[MR * in_features], dropped[drops == DROP_INPUT ? MR * in_features : 1];
        scalar_t packed[NR * in_features], last_out[MR * NR];
        memcpy(last_rows, x + full_rows * in_features, rest * in_features * sizeof(scalar_t));
        memset(last_rows + rest * in_features, 0, (MR - rest) * in_features * sizeof(scalar_t));
#pragma omp for schedule(dynamic)
        for (index_t row = 0; row < (rank ? rows : 0); row += MR) {
            const scalar_t *from = row == full_rows ? last_rows : x + row * in_features;
            if (drops == DROP_INPUT) {
                for (index_t i = 0; i < MR * in_features; i += 32) {
                    __mmask32 keep = keep_bits_32((uint32_t)(row * in_features + i), seed, threshold);
                    _mm512_storeu_si512(dropped + i, _mm512_maskz_loadu_epi16(keep, from + i));
                }
                from = dropped;
            }
            for (index_t column = 0; column < rank; column += NR) {
                __m512 sums[MR][2];
                tile_zero(sums, MR);
                tile_multiply(from, in_features, 2, a + column * in_features, 16 * in_features, in_features / 2, sums,
                              MR);
                tile_store(sums, lora_hidden + row * rank + column, rank);
            }
        }
        // Enough units of work for all threads: each column tile with a part of the rows.
        index_t row_tiles = (rows + MR - 1) / MR;
        index_t parts = (16 * omp_get_num_threads() + column_tiles - 1) / column_tiles;
        if (parts > row_tiles) parts = row_tiles;
#pragma omp for schedule(dynamic)
        for (index_t unit = 0; unit < column_tiles * parts; unit++) {
            index_t column = unit / parts * NR, part = unit % parts;
            pack_b(weight, packed, in_features, out_features, column, transposed);
            for (index_t row = part * row_tiles / parts * MR; row < (part + 1) * row_tiles / parts * MR; row += MR) {
                __m512 sums[MR][2];
                tile_zero(sums, MR);
                // The LoRA first, so that what dropout takes away of it is in the sums before anything else is.
                if (rank)
                    tile_multiply(lora_hidden + row * rank, rank, 2, b + column * rank, 16 * rank, rank / 2, sums, MR);
                if (drops == DROP_OUTPUT)
#pragma GCC unroll 14
                    for (index_t i = 0; i < MR; i++)
#pragma GCC unroll 2
                        for (index_t block = 0; block < 2; block++) {
                            uint32_t entry = (uint32_t)((row + i) * out_features + column + 16 * block);
                            u32x16 keep = keep_mask_16(entry, seed, threshold);
                            sums[i][block] = (__m512)((u32x16)sums[i][block] & keep);
                        }
                tile_multiply(row == full_rows ? last_rows : x + row * in_features, in_features, 2, packed,
                              16 * in_features, in_features / 2, sums, MR);
                if (bias)
#pragma GCC unroll 14
                    for (index_t i = 0; i < MR; i++)
#pragma GCC unroll 2
                        for (index_t block = 0; block < 2; block++)
                            sums[i][block] += (__m512)load_16(bias + column + 16 * block, 16);
                if (row < full_rows) {
                    tile_store(sums, out + row * out_features + column, out_features);
                    continue;
                }
                tile_store(sums, last_out, NR);
                for (index_t i = 0; i < rest; i++)
                    memcpy(out + (full_rows + i) * out_features + column, last_out + NR * i, NR * sizeof(scalar_t));
            }
        }
    }
}

#define ROW_BLOCK 2048 // rows whose pairs fit in the second cache

// out = scale * left^T x, the gradient of a LoRA's matrix; entries of x are dropped first if `drops`.
// left: (rows, rank), x: (rows, width), rank and width multiples of 32; out: (rank, width), float32;
// pairs: workspace of (rows up to an even number, rank).
void grad_weight(const scalar_t *left, const scalar_t *x, scalar_t *pairs, float *out, index_t rows, index_t rank,
                 index_t width, uint64_t seed, uint32_t threshold, index_t drops, float scale) {
    for (index_t row_block = 0; row_block < rows; row_block += ROW_BLOCK) {
        index_t count = min_index(rows - row_block, ROW_BLOCK), even = (count + 1) / 2 * 2;
        const scalar_t *x_block = x + row_block * width;
#pragma omp parallel
        {
            scalar_t packed[even * NR]; // a column tile of x
#pragma omp for schedule(static)
            for (index_t i = 0; i < count; i += 2)
                for (index_t column = 0; column < rank; column += 32) {
                    const scalar_t *from = left + (row_block + i) * rank + column;
                    __m512i second = i + 1 < count ? _mm512_loadu_si512(from + rank) : _mm512_setzero_si512();
                    interleave(_mm512_loadu_si512(from), second, pairs + i * rank + 2 * column, 32);
                }
#pragma omp for schedule(dynamic)
            for (index_t column = 0; column < width; column += NR) {
                for (index_t i = 0; i < even; i += 2) {
                    __m512i two_rows[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
                    for (index_t j = 0; j < 2 && i + j < count; j++) {
                        uint32_t entry = (uint32_t)((row_block + i + j) * width + column);
                        __mmask32 keep = drops ? keep_bits_32(entry, seed, threshold) : 0xffffffff;
                        two_rows[j] = _mm512_maskz_loadu_epi16(keep, x_block + (i + j) * width + column);
                    }
                    interleave(two_rows[0], two_rows[1], packed + 16 * i, 16 * even);
                }
                // Row i of `pairs` is a column of left: the rows of this product are the ranks.
                for (index_t first = 0; first < rank; first += FEW) {
                    __m512 sums[FEW][2];
                    tile_zero(sums, FEW);
                    tile_multiply(pairs + 2 * first, 2, 2 * rank, packed, 16 * even, even / 2, sums, FEW);
                    for (index_t row = 0; row < FEW; row++)
                        for (index_t block = 0; block < 2; block++) {
                            float *to = out + (first + row) * width + column + 16 * block;
                            f32x16 sum = (f32x16)sums[row][block] * scale, before = {0};
                            if (row_block) memcpy(&before, to, 64);
                            sum += before;
                            memcpy(to, &sum, 64);
                        }
                }
            }
        }
    }
}
