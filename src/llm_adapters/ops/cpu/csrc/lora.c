// LoRA in generation, each row with its own adapter, for any processor; and the memory layout of its matrices.
//
// The packed layout of a matrix (rows, columns), zero-padded: blocks of 16 columns, within a block pairs of rows. In
// bfloat16 the two rows of a pair are interleaved, which is the VNNI order that _mm512_dpbf16_ps reads; 64 bytes each:
//
//     block 0:  pair 0:  r0c0 r1c0  r0c1 r1c1  ...  r0c15 r1c15
//               pair 1:  r2c0 r3c0  r2c1 r3c1  ...  r2c15 r3c15
//               ...
//     block 1:  pair 0:  r0c16 r1c16  ...
//
// In float32 a pair is 16 entries of its first row, and then 16 of its second.

#include "numbers.h"

#define LORA_ROWS 8 // at a time: a weight that is read is used for so many

// sums[block][row] += x[row] times two blocks of 16 columns of packed weights.
static inline __attribute__((always_inline)) void multiply_rows(const scalar_t *const *x, const scalar_t *weights,
                                                                index_t pairs, f32x16 sums[2][LORA_ROWS]) {
    for (index_t i = 0; i < pairs; i++)
#pragma GCC unroll 2
        for (index_t block = 0; block < 2; block++) {
            const scalar_t *from = weights + (block * pairs + i) * 32;
#ifdef VNNI
            __m512bh columns;
            memcpy(&columns, from, 64);
#pragma GCC unroll 8
            for (index_t row = 0; row < LORA_ROWS; row++) {
                int pair;
                memcpy(&pair, x[row] + 2 * i, 4);
                __m512 sum = _mm512_dpbf16_ps((__m512)sums[block][row], columns, (__m512bh)_mm512_set1_epi32(pair));
                sums[block][row] = (f32x16)sum;
            }
#else
            f32x16 first, second;
            load_32(from, &first, &second);
#pragma GCC unroll 8
            for (index_t row = 0; row < LORA_ROWS; row++)
                sums[block][row] += to_float(x[row][2 * i]) * first + to_float(x[row][2 * i + 1]) * second;
#endif
        }
}

// A matrix times `scale` in the packed layout.
// matrix: (rows, columns), float32, with these steps between rows and columns; out: (padded_rows, padded_columns), the
// rows an even number, the columns a multiple of 16.
void pack_lora(const float *matrix, scalar_t *out, index_t rows, index_t columns, index_t row_stride,
               index_t column_stride, index_t padded_rows, index_t padded_columns, float scale) {
#pragma omp parallel for schedule(static)
    for (index_t block = 0; block < padded_columns; block += 16)
        for (index_t row = 0; row < padded_rows; row++)
            for (index_t i = 0; i < 16; i++) {
                index_t column = block + i;
#ifdef BFLOAT16
                index_t place = (block * padded_rows / 2 + row / 2 * 16 + i) * 2 + row % 2;
#else
                index_t place = block * padded_rows + row * 16 + i;
#endif
                int inside = row < rows && column < columns;
                out[place] = from_float(inside ? matrix[row * row_stride + column * column_stride] * scale : 0.0f);
            }
}

// out += (x A) B, for no more than LORA_ROWS rows of one adapter.
static void add_lora_rows(const scalar_t *x, const scalar_t *a, const scalar_t *b, scalar_t *out, index_t rows,
                          index_t in_features, index_t rank, index_t out_features) {
    scalar_t lora_hidden[LORA_ROWS * rank];
    const scalar_t *x_rows[LORA_ROWS], *hidden_rows[LORA_ROWS];
    for (index_t row = 0; row < LORA_ROWS; row++)  // those that are missing are computed and dropped
        x_rows[row] = x + (row < rows ? row : 0) * in_features, hidden_rows[row] = lora_hidden + row * rank;
    for (index_t column = 0; column < rank; column += 32) {
        f32x16 sums[2][LORA_ROWS] = {0};
        multiply_rows(x_rows, a + column * in_features, in_features / 2, sums);
        for (index_t block = 0; block < 2; block++)
            for (index_t row = 0; row < LORA_ROWS; row++)
                store_16(sums[block][row], lora_hidden + row * rank + column + 16 * block, 16);
    }
    for (index_t column = 0; column < out_features; column += 32) {
        f32x16 sums[2][LORA_ROWS] = {0};
        for (index_t block = 0; block < 2; block++)
            for (index_t row = 0; row < rows; row++) {
                index_t start = column + 16 * block;
                sums[block][row] = load_16(out + row * out_features + start, out_features - start);
            }
        multiply_rows(hidden_rows, b + column * rank, rank / 2, sums);
        for (index_t block = 0; block < 2; block++)
            for (index_t row = 0; row < rows; row++) {
                index_t start = column + 16 * block;
                store_16(sums[block][row], out + row * out_features + start, out_features - start);
            }
    }
}

// out += (x A) B, each row with the matrices of its own adapter; rows whose adapter is -1 stay as they are.
// x: (rows, in_features), in_features even; adapter_ids: (rows,), or NULL for adapter 0 everywhere;
// a: (adapters, in_features, rank) and b: (adapters, rank, out_features up to a multiple of 32), each matrix packed,
// rank a multiple of 32; out: (rows, out_features).
void lora_add(const scalar_t *x, const index_t *adapter_ids, const scalar_t *a, const scalar_t *b, scalar_t *out,
              index_t rows, index_t in_features, index_t rank, index_t out_features) {
    index_t padded_out = round_up(out_features, 32);
#pragma omp parallel for schedule(dynamic)
    for (index_t block = 0; block < rows; block += LORA_ROWS) {
        index_t end = block + LORA_ROWS < rows ? block + LORA_ROWS : rows;
        for (index_t start = block, stop; start < end; start = stop) { // runs of neighbours of one adapter
            index_t adapter = adapter_ids ? adapter_ids[start] : 0;
            for (stop = start + 1; stop < end && (!adapter_ids || adapter_ids[stop] == adapter);) stop++;
            if (adapter >= 0)
                add_lora_rows(x + start * in_features, a + adapter * in_features * rank,
                              b + adapter * rank * padded_out, out + start * out_features, stop - start, in_features,
                              rank, out_features);
        }
    }
}
