#include "codec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace ewa {
namespace {

constexpr uint8_t not_a_number = 255;
constexpr uint32_t infinity = 0x7f800000;

// Bits of the largest |v|, and of the largest v that is no less than 0; of what is no number, more than `infinity`.
struct Largest {
    uint32_t of_all;
    int32_t of_positive;
};

EWA_CLONES Largest largest(const float* v) {
    uint32_t of_all = 0;
    int32_t of_positive = 0;
#pragma omp simd reduction(max : of_all, of_positive)
    for (int64_t j = 0; j < scale_columns; ++j) {
        int32_t bits;
        std::memcpy(&bits, v + j, 4);
        of_positive = std::max(of_positive, bits);
        of_all = std::max(of_all, static_cast<uint32_t>(bits) & 0x7fffffffu);
    }
    return {of_all, of_positive};
}

float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Of the smallest scale that is no less, or the highest.
int64_t number(const Format& format, float largest) {
    const auto found = std::lower_bound(format.scales.begin(), format.scales.end(), largest);
    return std::min<int64_t>(found - format.scales.begin(), format.scales.size() - 1);
}

EWA_CLONES void to_8_bits(const float* v, float factor, uint8_t* codes) {
#pragma omp simd
    for (int64_t j = 0; j < scale_columns; ++j) {
        const float code = std::floor(v[j] * factor + 0.5f);
        const float least = v[j] > 0.0f ? 1.0f : -127.0f, most = v[j] > 0.0f ? 127.0f : 0.0f;
        codes[j] = static_cast<uint8_t>(static_cast<int32_t>(std::min(std::max(code, least), most)));
    }
}

EWA_CLONES void to_4_bits(const float* v, const float* edges, uint8_t* codes) {
    int32_t counts[scale_columns] = {};
    for (int64_t c = 0; c < 15; ++c) {
        const float edge = edges[c];
#pragma omp simd
        for (int64_t j = 0; j < scale_columns; ++j) counts[j] += v[j] > edge ? 1 : 0;
    }
#pragma omp simd
    for (int64_t j = 0; j < scale_columns / 2; ++j)
        codes[j] = static_cast<uint8_t>(counts[j] | counts[j + scale_columns / 2] << 4);
}

EWA_CLONES void from_8_bits(const uint8_t* codes, float step, float* to) {
#pragma omp simd
    for (int64_t j = 0; j < scale_columns; ++j) to[j] = static_cast<float>(static_cast<int8_t>(codes[j])) * step;
}

EWA_CLONES void from_4_bits(const uint8_t* codes, const float* levels, float* to) {
#pragma omp simd
    for (int64_t j = 0; j < scale_columns / 2; ++j) {
        to[j] = levels[codes[j] & 15];
        to[j + scale_columns / 2] = levels[codes[j] >> 4];
    }
}

uint8_t encode_block(const Format& format, const Codebook& codebook, const float* v, uint8_t* codes) {
    const Largest found = largest(v);
    if (found.of_all >= infinity) {
        std::memset(codes, 0, scale_columns * format.bits / 8);
        return not_a_number;
    }
    int64_t scale = number(format, as_float(found.of_all));
    if (format.bits == 8) {
        to_8_bits(v, 127.0f / format.scales[scale], codes);
        return static_cast<uint8_t>(scale);
    }
    const bool is_own = scale >= codebook.first_scale;
    if (is_own) scale = std::max(number(format, as_float(found.of_positive)), codebook.first_scale);
    const Codebook& book = is_own ? codebook : format.symmetric;
    float edges[15];
    for (int64_t c = 0; c < 15; ++c) edges[c] = book.edges[c] * (c < book.num_fixed ? 1.0f : format.scales[scale]);
    to_4_bits(v, edges, codes);
    return static_cast<uint8_t>(scale);
}

void decode_block(const Format& format, const Codebook& codebook, uint8_t scale, const uint8_t* codes, float* to) {
    if (scale == not_a_number) {
        std::fill_n(to, scale_columns, NAN);
    } else if (format.bits == 8) {
        from_8_bits(codes, format.scales[scale] / 127.0f, to);
    } else {
        const Codebook& book = scale >= codebook.first_scale ? codebook : format.symmetric;
        float levels[16];
        for (int64_t c = 0; c < 16; ++c) levels[c] = book.levels[c] * (c < book.num_fixed ? 1.0f : format.scales[scale]);
        from_4_bits(codes, levels, to);
    }
}

int64_t blocks(int64_t columns) { return (columns + scale_columns - 1) / scale_columns; }

int64_t blocks_of_row(const Format& format, int64_t columns) {
    const int64_t parts = format.parts.size();
    return parts * blocks(columns / parts);
}

// Calls work(block number, first of up to 32 columns, how many).
template <class Work>
void by_block(const Kept& kept, int64_t row, int64_t columns, int64_t part, int64_t column, int64_t n, Work work) {
    const int64_t of_part = blocks(columns / static_cast<int64_t>(kept.format->parts.size()));
    int64_t block = row * blocks_of_row(*kept.format, columns) + part * of_part + column / scale_columns;
    for (int64_t j = 0; j < n; j += scale_columns, ++block) work(block, j, std::min(scale_columns, n - j));
}

}  // namespace

Kept Kept::from(int64_t row, int64_t columns) const {
    Kept moved = *this;
    if (format == nullptr) {
        if (matrix.at != nullptr) moved.matrix.at = const_cast<char*>(matrix.element(row * columns));
        return moved;
    }
    const int64_t before = row * blocks_of_row(*format, columns);
    moved.codes += before * scale_columns * format->bits / 8;
    moved.scales += before;
    return moved;
}

void encode(const Kept& kept, int64_t row, int64_t columns, int64_t part, int64_t column, int64_t n, const float* from) {
    const Format& format = *kept.format;
    by_block(kept, row, columns, part, column, n, [&](int64_t block, int64_t first, int64_t count) {
        uint8_t* const codes = kept.codes + block * scale_columns * format.bits / 8;
        const float* v = from + first;
        float filled[scale_columns] = {};
        if (count < scale_columns) v = static_cast<float*>(std::memcpy(filled, v, count * sizeof(float)));
        kept.scales[block] = encode_block(format, format.parts[part], v, codes);
    });
}

void decode(const Kept& kept, int64_t row, int64_t columns, int64_t part, int64_t column, int64_t n, float* to) {
    const Format& format = *kept.format;
    by_block(kept, row, columns, part, column, n, [&](int64_t block, int64_t first, int64_t count) {
        const uint8_t* const codes = kept.codes + block * scale_columns * format.bits / 8;
        if (count == scale_columns) return decode_block(format, format.parts[part], kept.scales[block], codes, to + first);
        float filled[scale_columns];
        decode_block(format, format.parts[part], kept.scales[block], codes, filled);
        std::memcpy(to + first, filled, count * sizeof(float));
    });
}

void encode_rows(Matrix in, int64_t n, int64_t columns, const Kept& kept) {
    const int64_t parts = kept.format->parts.size(), width = columns / parts;
#pragma omp parallel
    {
        std::vector<float> row(in.type == Type::float32 ? 0 : columns);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i) {
            const float* from = reinterpret_cast<const float*>(in.element(i * columns));
            if (in.type != Type::float32) {
                widen_row(in.type, columns, reinterpret_cast<const uint16_t*>(from), row.data());
                from = row.data();
            }
            for (int64_t part = 0; part < parts; ++part) encode(kept, i, columns, part, 0, width, from + part * width);
        }
    }
}

void decode_rows(const Kept& kept, int64_t n, int64_t columns, Matrix out) {
    const int64_t parts = kept.format->parts.size(), width = columns / parts;
#pragma omp parallel
    {
        std::vector<float> row(out.type == Type::float32 ? 0 : columns);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i) {
            char* const to = const_cast<char*>(out.element(i * columns));
            float* const values = out.type == Type::float32 ? reinterpret_cast<float*>(to) : row.data();
            for (int64_t part = 0; part < parts; ++part) decode(kept, i, columns, part, 0, width, values + part * width);
            if (out.type == Type::float16) saturate_row(columns, values);
            if (out.type != Type::float32) narrow_row(out.type, columns, values, reinterpret_cast<uint16_t*>(to));
        }
    }
}

}  // namespace ewa
