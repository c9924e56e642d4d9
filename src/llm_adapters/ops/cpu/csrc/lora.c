// LoRA in generation, each row with its own adapter, for any processor; and the order in which its matrices lie.

#include "numbers.h"

#define ROWS 8 // at a time: a weight that is read is used for so many

// sums[block][row] += x[row] times two blocks of 16 columns of weights, which lie pair by pair of their rows:
// (blocks, pairs, 16, 2) in bfloat16, (blocks, pairs, 2, 16) in float32, as `load` wants them.
static inline __attribute__((always_inline)) void multiply(const T *const *x, const T *weights, Int pairs,
                                                           Lanes sums[2][ROWS]) {
    for (Int i = 0; i < pairs; i++)
#pragma GCC unroll 2
        for (Int block = 0; block < 2; block++) {
            const T *from = weights + (block * pairs + i) * 32;
#ifdef PAIRS
            __m512bh columns;
            memcpy(&columns, from, 64);
#pragma GCC unroll 8
            for (Int row = 0; row < ROWS; row++) {
                int pair;
                memcpy(&pair, x[row] + 2 * i, 4);
                __m512 sum = _mm512_dpbf16_ps((__m512)sums[block][row], columns, (__m512bh)_mm512_set1_epi32(pair));
                sums[block][row] = (Lanes)sum;
            }
#else
            Lanes first, second;
            load(from, &first, &second);
#pragma GCC unroll 8
            for (Int row = 0; row < ROWS; row++)
                sums[block][row] += get(x[row][2 * i]) * first + get(x[row][2 * i + 1]) * second;
#endif
        }
}

static inline void narrowed(Lanes values, T *to, Int count) {
    float all[16];
    T some[16];
    memcpy(all, &values, 64);
#pragma omp simd
    for (Int i = 0; i < 16; i++) some[i] = put(all[i]);
    if (count >= 16) memcpy(to, some, sizeof some);
    else
        for (Int i = 0; i < count; i++) to[i] = some[i];
}

// A matrix with these steps between rows and columns, times `scale`, in the order in which `multiply` reads it, filled up
// with zeros to whole numbers of rows and columns.
void pair(const float *from, T *to, Int rows, Int columns, Int row_step, Int column_step, Int whole_rows,
          Int whole_columns, float scale) {
#pragma omp parallel for schedule(static)
    for (Int block = 0; block < whole_columns; block += 16)
        for (Int row = 0; row < whole_rows; row++)
            for (Int i = 0; i < 16; i++) {
                Int column = block + i;
#ifdef BFLOAT16
                Int place = (block * whole_rows / 2 + row / 2 * 16 + i) * 2 + row % 2;
#else
                Int place = block * whole_rows + row * 16 + i;
#endif
                int there = row < rows && column < columns;
                to[place] = put(there ? from[row * row_step + column * column_step] * scale : 0.0f);
            }
}

// out += (x down) up, for no more than ROWS rows of one adapter; `in` is even, `rank` a multiple of 32.
static void some_rows(const T *x, const T *down, const T *up, T *out, Int rows, Int in, Int rank, Int width) {
    T own[ROWS * rank];
    const T *from[ROWS], *between[ROWS];
    for (Int row = 0; row < ROWS; row++)  // those that are missing are computed and dropped
        from[row] = x + (row < rows ? row : 0) * in, between[row] = own + row * rank;
    for (Int at = 0; at < rank; at += 32) {
        Lanes sums[2][ROWS] = {0};
        multiply(from, down + at * in, in / 2, sums);
        for (Int block = 0; block < 2; block++)
            for (Int row = 0; row < ROWS; row++) narrowed(sums[block][row], own + row * rank + at + 16 * block, 16);
    }
    for (Int at = 0; at < width; at += 32) {
        Lanes sums[2][ROWS] = {0};
        for (Int block = 0; block < 2; block++)
            for (Int row = 0; row < rows; row++)
                sums[block][row] = widened(out + row * width + at + 16 * block, width - at - 16 * block);
        multiply(between, up + at * rank, rank / 2, sums);
        for (Int block = 0; block < 2; block++)
            for (Int row = 0; row < rows; row++) {
                Int column = at + 16 * block;
                narrowed(sums[block][row], out + row * width + column, width - column);
            }
    }
}

// Rows whose adapter is -1 stay as they are; without `which` all are of the first.
void lora(const T *x, const Int *which, const T *down, const T *up, T *out, Int rows, Int in, Int rank, Int width) {
    Int whole = (width + 31) / 32 * 32;
#pragma omp parallel for schedule(dynamic)
    for (Int block = 0; block < rows; block += ROWS) {
        Int end = block + ROWS < rows ? block + ROWS : rows;
        for (Int start = block, stop; start < end; start = stop) {
            Int adapter = which ? which[start] : 0;
            for (stop = start + 1; stop < end && (!which || which[stop] == adapter);) stop++;
            if (adapter >= 0)
                some_rows(x + start * in, down + adapter * in * rank, up + adapter * rank * whole, out + start * width,
                          stop - start, in, rank, width);
        }
    }
}
