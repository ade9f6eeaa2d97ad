// The operands of a matrix product, and how they are packed: see tile.h.
#pragma once

#include "tile.h"

#ifdef EWA_AVX512
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "elements.h"
#include "products.h"

namespace ewa {

// Words (see tile.h) of a sum that are packed together: a panel of the left operand stays in the first cache.
constexpr int64_t most_words = 384;
// Rows of the result that one thread makes at a time, where tasks share a right operand, and where it is one task's alone;
// and columns that it goes through together: for so many words what both need of the operands stays in the second cache.
constexpr int64_t task_rows = 8 * tile_rows, most_task_rows = 27 * tile_rows, block_columns = 256;

inline int64_t padded(int64_t columns) { return ceil_div(columns, tile_columns) * tile_columns; }

// 0 … total in parts of `most` or less, all alike large up to one.
struct Parts {
    int64_t total, count;

    Parts(int64_t total, int64_t most) : total(total), count(ceil_div(total, most)) {}
    int64_t start(int64_t i) const { return count == 0 ? 0 : total * i / count; }
    int64_t size(int64_t i) const { return start(i + 1) - start(i); }
    int64_t most() const { return count == 0 ? 0 : ceil_div(total, count); }
};

// result [m, n] = left [m, k] · right [k, n] of one expert, whose operands begin at these of their rows.
struct Product {
    int64_t m, n, k, words;
    int64_t left_row, right_row, result_row;

    int64_t right_size() const { return padded(n) * words; }
    Parts parts() const { return {words, most_words}; }
};

struct Operand {
    Tokens tokens;
    int64_t columns;     // in memory
    bool sum_over_rows;  // else over columns

    const char* element(int64_t row, int64_t column) const {
        return tokens.matrix.element((tokens.rows == nullptr ? row : tokens.rows[row]) * columns + column);
    }
};

template <bool bfloat16>
using Element = std::conditional_t<bfloat16, uint16_t, float>;
template <bool bfloat16>
constexpr int64_t terms_of_word = bfloat16 ? 2 : 1;

// Of one row, for what is read of it at a time: words of a row, or columns of those of a task or a block.
static_assert(most_task_rows <= most_words && block_columns <= most_words);
template <bool bfloat16>
struct Memory {
    float floats[most_words];
};
template <>
struct Memory<true> {
    float floats[2 * most_words];
    uint16_t narrow[2 * most_words];
};

// Elements column … column + n − 1 of a row as a product takes them: in place, or in `memory`.
template <bool bfloat16>
const Element<bfloat16>* read(const Operand& from, int64_t row, int64_t column, int64_t n, Memory<bfloat16>& memory) {
    const Tokens& tokens = from.tokens;
    const char* const at = from.element(row, column);
    const float* floats = reinterpret_cast<const float*>(at);
    const uint16_t* narrow = reinterpret_cast<const uint16_t*>(at);
    if constexpr (bfloat16)
        if (tokens.factor == nullptr) return narrow;
    if (tokens.matrix.type != Type::float32) {
        widen_row(tokens.matrix.type, n, narrow, memory.floats);
        floats = memory.floats;
    }
    if (tokens.factor != nullptr) {
        affine_row(n, floats, nullptr, tokens.factor[row], memory.floats);
        floats = memory.floats;
    }
    if constexpr (bfloat16) {
        narrow_row(Type::bfloat16, n, floats, memory.narrow);
        return memory.narrow;
    } else {
        return floats;
    }
}

// Asks for n elements of a row, if it is one of those before `end`, so that they are in the cache when they are read:
// processors do not foresee so many short rows, and packing waits for memory more than for anything else.
EWA_INLINE void fetch(const Operand& from, int64_t row, int64_t end, int64_t column, int64_t n) {
    if (row >= end) return;
    const char *at = from.element(row, column), *const last = at + n * from.tokens.matrix.element_size();
    for (at -= reinterpret_cast<uintptr_t>(at) % line_bytes; at < last; at += line_bytes) __builtin_prefetch(at);
}

// The next 16 words of one row of which there are n elements.
EWA_AVX512 EWA_INLINE __m512 words_of_row(const float* from, int64_t n) {
    return _mm512_maskz_loadu_ps(first_lanes(n), from);
}
EWA_AVX512 EWA_INLINE __m512 words_of_row(const uint16_t* from, int64_t n) {
    const __mmask32 mask = n >= 2 * lanes ? ~0u : (1u << std::max<int64_t>(n, 0)) - 1;
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, from));
}

// 16 words, of n columns of one row, or two, of which the second one may be null.
EWA_AVX512 EWA_INLINE __m512 words_of_columns(const float* row, const float*, int64_t n) {
    return _mm512_maskz_loadu_ps(first_lanes(n), row);
}
EWA_AVX512 EWA_INLINE __m512i widened(const uint16_t* from, int64_t n) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), from));
}
EWA_AVX512 EWA_INLINE __m512 words_of_columns(const uint16_t* row, const uint16_t* next, int64_t n) {
    __m512i words = widened(row, n);
    if (next != nullptr) words = _mm512_or_si512(words, _mm512_slli_epi32(widened(next, n), 16));
    return _mm512_castsi512_ps(words);
}

// Words word … of `rows` rows, of which a sum is over the columns: a panel [words][step]. The next rows before `end` are
// fetched meanwhile.
template <bool bfloat16>
EWA_AVX512 void pack_columns(const Operand& from, int64_t row, int64_t rows, int64_t end, int64_t word, int64_t words,
                             int64_t step, float* panel) {
    constexpr int64_t terms = terms_of_word<bfloat16>;
    Memory<bfloat16> memory[lanes];
    const Element<bfloat16>* at[lanes];
    const int64_t n = std::min(words * terms, from.columns - word * terms);
    for (int i = 0; i < rows; ++i) at[i] = read(from, row + i, word * terms, n, memory[i]);
    const __mmask16 width = first_lanes(step);
    for (int64_t p = 0; p < words; p += lanes) {
        for (int i = 0; i < rows; ++i) fetch(from, row + rows + i, end, (word + p) * terms, 1);
        __m512 block[lanes];
        for (int i = 0; i < lanes; ++i)
            block[i] = i < rows ? words_of_row(at[i] + p * terms, n - p * terms) : _mm512_setzero_ps();
        transpose(block);
        for (int i = 0; i < std::min(words - p, lanes); ++i)
            _mm512_mask_storeu_ps(panel + (p + i) * step, width, block[i]);
    }
}

// The rows that a word of a sum over rows is made of; bfloat16 has a second one, unless that is past the last one.
template <bool bfloat16>
struct RowsOfWord {
    const Element<bfloat16>*first, *second;

    RowsOfWord(const Operand& from, int64_t row, int64_t k, int64_t word, int64_t column, int64_t n,
               Memory<bfloat16> (&memory)[2]) {
        constexpr int64_t terms = terms_of_word<bfloat16>;
        for (int64_t i = 0; i < terms; ++i) fetch(from, row + (word + words_ahead) * terms + i, row + k, column, n);
        first = read(from, row + word * terms, column, n, memory[0]);
        second = bfloat16 && word * terms + 1 < k ? read(from, row + word * terms + 1, column, n, memory[1]) : nullptr;
    }
    // n columns, and zeros up to `width`.
    EWA_AVX512 void pack(int64_t column, int64_t n, int64_t width, float* to) const {
        for (int64_t j = 0; j < width; j += lanes) {
            const auto* next = second == nullptr ? nullptr : second + column + j;
            _mm512_mask_storeu_ps(to + j, first_lanes(width - j), words_of_columns(first + column + j, next, n - j));
        }
    }
    // Of the i-th column.
    float sum(int64_t i) const {
        if constexpr (bfloat16)
            return widen(BFloat16{first[i]}) + (second == nullptr ? 0.0f : widen(BFloat16{second[i]}));
        else
            return first[i];
    }
};

// Words word … and columns column … of the right operand, in panels of tile_columns.
template <bool bfloat16>
EWA_AVX512 void pack_right(const Operand& right, const Product& product, int64_t word, int64_t words, int64_t column,
                           float* panels) {
    const int64_t columns = std::min(block_columns, product.n - column);
    Memory<bfloat16> memory[2];
    for (int64_t p = 0; right.sum_over_rows && p < words; ++p) {
        const RowsOfWord<bfloat16> rows(right, product.right_row, product.k, word + p, column, columns, memory);
        for (int64_t j = 0; j < columns; j += tile_columns)
            rows.pack(j, columns - j, tile_columns, panels + j * words + p * tile_columns);
    }
    for (int64_t j = 0; !right.sum_over_rows && j < padded(columns); j += lanes)
        pack_columns<bfloat16>(right, product.right_row + column + j, std::clamp<int64_t>(columns - j, 0, lanes),
                               product.right_row + product.n, word, words, tile_columns,
                               panels + j / tile_columns * tile_columns * words + j % tile_columns);
}

// The memory that pack_right will read, if its rows lie in order.
template <bool bfloat16>
Ahead right_ahead(const Operand& right, const Product& product, int64_t word, int64_t words, int64_t column,
                  int64_t columns) {
    if (right.tokens.rows != nullptr) return {};
    const int64_t term = word * terms_of_word<bfloat16>, terms = std::min(words * terms_of_word<bfloat16>, product.k - term);
    const int64_t size = right.tokens.matrix.element_size(), stride = right.columns * size;
    if (right.sum_over_rows) return {right.element(product.right_row + term, column), columns * size, terms, stride};
    return {right.element(product.right_row + column, term), terms * size, columns, stride};
}

// Words word … of rows first … of the left operand, in panels of so many rows; its terms are added to `sums`, which may
// be null.
template <bool bfloat16>
EWA_AVX512 void pack_left(const Operand& left, const Product& product, int64_t first, const Parts& rows, int64_t word,
                          int64_t words, float* panels, double* sums) {
    Memory<bfloat16> memory[2];
    float of_these[most_task_rows] = {};
    for (int64_t p = 0; left.sum_over_rows && p < words; ++p) {
        const RowsOfWord<bfloat16> of_word(left, product.left_row, product.k, word + p, first, rows.total, memory);
        for (int64_t i = 0; i < rows.count; ++i)
            of_word.pack(rows.start(i), rows.size(i), rows.size(i), panels + rows.start(i) * words + p * rows.size(i));
        for (int64_t i = 0; sums != nullptr && i < rows.total; ++i) of_these[i] += of_word.sum(i);
    }
    for (int64_t i = 0; sums != nullptr && i < rows.total; ++i) sums[i] += of_these[i];
    for (int64_t i = 0; !left.sum_over_rows && i < rows.count; ++i)
        pack_columns<bfloat16>(left, product.left_row + first + rows.start(i), rows.size(i),
                               product.left_row + product.m, word, words, rows.size(i),
                               panels + rows.start(i) * words);
}

}  // namespace ewa
#endif
