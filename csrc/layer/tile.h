// The innermost loops of a matrix product: a tile of the result in AVX-512 registers, and the order it reads memory in.
//
// Operands are packed in words of 32 bits, which are one float32 or two bfloat16 that are terms of the same sum: `left`
// in panels of 1 to tile_rows rows, [words][rows], `right` in panels of tile_columns columns, [words][columns].
#pragma once

#include "avx512.h"

#ifdef EWA_AVX512
#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

namespace ewa {

// 28 sums, two vectors of `right` and one word of `left` are 31 of the 32 registers.
constexpr int64_t tile_rows = 14, tile_columns = 32;

// Words ahead of which an operand is fetched, and after which what comes next is.
constexpr int64_t words_ahead = 8;
constexpr int64_t line_bytes = 64;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// sum + left · right, word by word.
template <bool bfloat16>
EWA_AVX512 EWA_INLINE __m512 multiply_add(__m512 left, __m512 right, __m512 sum) {
    if constexpr (bfloat16)
        return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
    else
        return _mm512_fmadd_ps(left, right, sum);
}

// Memory that is read soon: lines of rows. Tiles ask for one now and then; all at once, they would wait for them.
struct Ahead {
    const char* row = nullptr;
    int64_t stride = 0, lines = 0;  // bytes from row to row; lines of each
    int64_t line = 0, left = 0;     // the next one of `row`; how many there are to come

    Ahead() = default;
    Ahead(const char* first, int64_t bytes, int64_t rows, int64_t row_stride)
        : row(first), stride(row_stride), lines(ceil_div(bytes, line_bytes)), left(lines * rows) {}
    Ahead(const float* first, int64_t floats)
        : Ahead(reinterpret_cast<const char*>(first), floats * static_cast<int64_t>(sizeof(float)), 1, 0) {}

    void ask() {
        if (left == 0) return;
        _mm_prefetch(row + line * line_bytes, _MM_HINT_T1);
        --left;
        if (++line < lines) return;
        line = 0;
        row += stride;
    }
};

// out = left · right, or is added to it; out has `columns` columns, at most tile_columns.
template <bool bfloat16, int rows>
EWA_AVX512 void tile(int64_t words, const float* left, const float* right, float* out, int64_t row_of_out,
                     int64_t columns, bool add, Ahead& next) {
    __m512 sums[rows][2];
    Ahead ahead = next;  // in registers
    // What comes from the second cache is asked for early, the result and `right`; `left` stays in the first one.
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < 2; ++j) __builtin_prefetch(out + i * row_of_out + j * lanes, 1);
    for (int i = 0; i < rows; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int64_t p = 0; p < words; ++p, left += rows, right += tile_columns) {
        const __m512 right_0 = _mm512_loadu_ps(right), right_1 = _mm512_loadu_ps(right + lanes);
        for (int j = 0; j < 2; ++j) __builtin_prefetch(right + words_ahead * tile_columns + j * lanes);
        if (p % words_ahead == 0) ahead.ask();
#pragma GCC unroll 14
        for (int i = 0; i < rows; ++i) {
            const __m512 word = _mm512_set1_ps(left[i]);
            sums[i][0] = multiply_add<bfloat16>(word, right_0, sums[i][0]);
            sums[i][1] = multiply_add<bfloat16>(word, right_1, sums[i][1]);
        }
    }
    next = ahead;
    const __mmask16 masks[2] = {first_lanes(columns), first_lanes(columns - lanes)};
#pragma GCC unroll 14
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < 2; ++j) {
            float* at = out + i * row_of_out + j * lanes;
            if (add) sums[i][j] = _mm512_add_ps(sums[i][j], _mm512_maskz_loadu_ps(masks[j], at));
            _mm512_mask_storeu_ps(at, masks[j], sums[i][j]);
        }
}

using Tile = void (*)(int64_t, const float*, const float*, float*, int64_t, int64_t, bool, Ahead&);

// By the number of rows, from 1.
template <bool bfloat16, int... i>
constexpr std::array<Tile, sizeof...(i)> tiles_of(std::integer_sequence<int, i...>) {
    return {tile<bfloat16, i + 1>...};
}
template <bool bfloat16>
constexpr auto tiles = tiles_of<bfloat16>(std::make_integer_sequence<int, tile_rows>());

// 16 x 16 words, rows to columns.
EWA_AVX512 EWA_INLINE void transpose(__m512 (&row)[lanes]) {
    __m512 pairs[lanes], fours[lanes];
    for (int i = 0; i < lanes; i += 2) {
        pairs[i] = _mm512_unpacklo_ps(row[i], row[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
    }
    // fours[4g + c]: columns c, c + 4, c + 8 and c + 12 of rows 4g … 4g + 3.
    for (int i = 0; i < lanes; i += 4) {
        for (int odd = 0; odd < 2; ++odd) {
            const __m512d upper = _mm512_castps_pd(pairs[i + odd]), lower = _mm512_castps_pd(pairs[i + 2 + odd]);
            fours[i + 2 * odd] = _mm512_castpd_ps(_mm512_unpacklo_pd(upper, lower));
            fours[i + 2 * odd + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(upper, lower));
        }
    }
    for (int c = 0; c < 4; ++c) {
        const __m512 first = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x44);    // columns c, c + 4 of rows 0 … 7
        const __m512 second = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xEE);   // columns c + 8, c + 12
        const __m512 third = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x44);
        const __m512 fourth = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xEE);
        row[c] = _mm512_shuffle_f32x4(first, third, 0x88);
        row[c + 4] = _mm512_shuffle_f32x4(first, third, 0xDD);
        row[c + 8] = _mm512_shuffle_f32x4(second, fourth, 0x88);
        row[c + 12] = _mm512_shuffle_f32x4(second, fourth, 0xDD);
    }
}

}  // namespace ewa
#endif
