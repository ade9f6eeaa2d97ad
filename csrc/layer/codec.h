// How activations are kept in 8 and in 4 bits: specified by ewa_kernels/codec.py, where the tables come from.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "matrix.h"

namespace ewa {

constexpr int64_t scale_columns = 32;  // that share a scale

// See ewa_kernels/codec.py.
struct Codebook {
    int64_t first_scale, num_fixed;
    std::array<float, 16> levels;
    std::array<float, 15> edges;
};

struct Format {
    int64_t bits;
    std::vector<float> scales;
    Codebook symmetric;
    std::vector<Codebook> parts;  // a row's: one, or those of gate and value, of as many columns
};

// Rows that are kept: in a matrix, or in a format, as all codes and all scales.
struct Kept {
    Matrix matrix;  // its type is that of what is kept; `at` is null where it is in a format, or not kept
    const Format* format = nullptr;
    uint8_t *codes = nullptr, *scales = nullptr;

    bool is_there() const { return matrix.at != nullptr || format != nullptr; }
    // From row `row` on, of rows of `columns`.
    Kept from(int64_t row, int64_t columns) const;
};

// n columns of part `part` of row `row`, from column `column` on, which scale_columns divides; all rows have `columns`.
void encode(const Kept& kept, int64_t row, int64_t columns, int64_t part, int64_t column, int64_t n, const float* from);
void decode(const Kept& kept, int64_t row, int64_t columns, int64_t part, int64_t column, int64_t n, float* to);

// All of n rows.
void encode_rows(Matrix in, int64_t n, int64_t columns, const Kept& kept);
void decode_rows(const Kept& kept, int64_t n, int64_t columns, Matrix out);

}  // namespace ewa
