#include "codec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "avx512.h"

namespace ewa {
namespace {

constexpr uint8_t not_a_number = 255;
constexpr uint32_t infinity = 0x7f800000;

constexpr float to_whole = 12582912.0f;  // 1.5·2^23: adding it rounds to a whole number

// Scales are an eighth of a power of 2 apart from 2^−9 to 2^9; that of 1 has this number.
constexpr int32_t fine_powers = 9, scale_of_1 = 118;
// Bits of 2^(i/8) in float32, i = 0 … 7, without the exponent.
constexpr int32_t eighths_of_2[] = {0, 0x0b95c2, 0x1837f0, 0x25fed7, 0x3504f3, 0x45672a, 0x5744fd, 0x6ac0c7};

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

// k of the smallest scale that is no less than a finite number ≥ 0 of these bits, or the highest: a search in the table,
// by the exponent, that takes no branch.
EWA_INLINE int32_t number_of(uint32_t bits, int32_t last) {
    const int32_t exponent = static_cast<int32_t>(bits >> 23) - 127, rest = bits & 0x7fffff;
    const int32_t power = exponent + (rest > 0);  // of 2 that is no less
    int32_t eighths = 0;
    for (const int32_t bound : eighths_of_2) eighths += rest > bound;
    int32_t j = exponent * 8 + eighths;
    j = power > fine_powers ? 8 * fine_powers + (power - fine_powers + 1) / 2 : j;
    j = power < 1 - fine_powers ? -8 * fine_powers - std::max(-fine_powers - power, 0) / 2 : j;
    return std::min(std::max(j + scale_of_1, 0), last);
}

EWA_CLONES void to_8_bits(const float* v, float factor, uint8_t* codes) {
#pragma omp simd
    for (int64_t j = 0; j < scale_columns; ++j) {
        const float multiple = std::min(std::max(v[j] * factor, -127.0f), 127.0f);
        const float code = std::max((multiple + to_whole) - to_whole, v[j] > 0.0f ? 1.0f : -127.0f);
        codes[j] = static_cast<uint8_t>(static_cast<int32_t>(code));
    }
}

// The last edge that is a value, below which values are compared, and above which multiples of the scale are.
float last_fixed(const Codebook& book) { return book.num_fixed > 0 ? book.edges[book.num_fixed - 1] : -INFINITY; }
// Multiples are no less.
float least_multiple(const Codebook& book) { return book.num_fixed > 0 ? 0.0f : -INFINITY; }

EWA_CLONES void to_4_bits(const float* v, const Codebook& book, float inverse, uint8_t* codes) {
    const float fixed = last_fixed(book), least = least_multiple(book);
    float t[scale_columns];
    int32_t counts[scale_columns] = {};
#pragma omp simd
    for (int64_t j = 0; j < scale_columns; ++j) t[j] = v[j] > fixed ? std::max(v[j] * inverse, least) : v[j];
    for (int64_t c = 0; c < 15; ++c) {
        const float edge = book.edges[c];
#pragma omp simd
        for (int64_t j = 0; j < scale_columns; ++j) counts[j] += t[j] > edge ? 1 : 0;
    }
#pragma omp simd
    for (int64_t j = 0; j < scale_columns / 2; ++j)
        codes[j] = static_cast<uint8_t>(counts[j] | counts[j + scale_columns / 2] << 4);
}

EWA_CLONES void from_8_bits(const uint8_t* codes, float step, float* to) {
#pragma omp simd
    for (int64_t j = 0; j < scale_columns; ++j) to[j] = static_cast<float>(static_cast<int8_t>(codes[j])) * step;
}

EWA_CLONES void from_4_bits(const uint8_t* codes, const Codebook& book, float scale, float* to) {
    float levels[16];
    for (int64_t c = 0; c < 16; ++c) levels[c] = c < book.num_fixed ? book.levels[c] : book.levels[c] * scale;
#pragma omp simd
    for (int64_t j = 0; j < scale_columns / 2; ++j) {
        to[j] = levels[codes[j] & 15];
        to[j + scale_columns / 2] = levels[codes[j] >> 4];
    }
}

#ifdef EWA_AVX512
// The same with the block, and a codebook, in registers.
EWA_AVX512 EWA_INLINE __m512i codes_of(const float* v, const Codebook& book, float inverse, __m512 edges) {
    const __m512 given = _mm512_loadu_ps(v);
    const __mmask16 is_multiple = _mm512_cmp_ps_mask(given, _mm512_set1_ps(last_fixed(book)), _CMP_GT_OQ);
    const __m512 least = _mm512_set1_ps(least_multiple(book));
    const __m512 multiples = _mm512_max_ps(_mm512_mul_ps(given, _mm512_set1_ps(inverse)), least);
    const __m512 values = _mm512_mask_blend_ps(is_multiple, given, multiples);
    __m512i codes = _mm512_setzero_si512();
    for (const int32_t step : {8, 4, 2, 1}) {
        const __m512 edge = _mm512_permutexvar_ps(_mm512_add_epi32(codes, _mm512_set1_epi32(step - 1)), edges);
        const __mmask16 above = _mm512_cmp_ps_mask(values, edge, _CMP_GT_OQ);
        codes = _mm512_mask_add_epi32(codes, above, codes, _mm512_set1_epi32(step));
    }
    return codes;
}

EWA_AVX512 Largest largest_at_once(const float* v) {
    const __m512i low = _mm512_loadu_si512(v), high = _mm512_loadu_si512(v + scale_columns / 2);
    const __m512i all = _mm512_set1_epi32(0x7fffffff);
    const __m512i of_all = _mm512_max_epu32(_mm512_and_si512(low, all), _mm512_and_si512(high, all));
    const __m512i of_positive = _mm512_max_epi32(_mm512_max_epi32(low, high), _mm512_setzero_si512());
    return {_mm512_reduce_max_epu32(of_all), _mm512_reduce_max_epi32(of_positive)};
}

EWA_AVX512 void to_8_bits_at_once(const float* v, float factor, uint8_t* codes) {
    for (int64_t j = 0; j < scale_columns; j += 16) {
        const __m512 values = _mm512_loadu_ps(v + j), most = _mm512_set1_ps(127), least = _mm512_set1_ps(-127);
        const __m512 multiples = _mm512_mul_ps(values, _mm512_set1_ps(factor));
        const __mmask16 is_positive = _mm512_cmp_ps_mask(values, _mm512_setzero_ps(), _CMP_GT_OQ);
        __m512i whole = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(multiples, least), most));
        whole = _mm512_mask_max_epi32(whole, is_positive, whole, _mm512_set1_epi32(1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + j), _mm512_cvtepi32_epi8(whole));
    }
}

EWA_AVX512 void to_4_bits_at_once(const float* v, const Codebook& book, float inverse, uint8_t* codes) {
    const __m512 edges = _mm512_maskz_loadu_ps(0x7fff, book.edges.data());
    const __m512i low = codes_of(v, book, inverse, edges);
    const __m512i high = codes_of(v + scale_columns / 2, book, inverse, edges);
    const __m512i both = _mm512_or_si512(low, _mm512_slli_epi32(high, 4));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(both));
}

EWA_AVX512 void from_4_bits_at_once(const uint8_t* codes, const Codebook& book, float scale, float* to) {
    const __m512 all = _mm512_loadu_ps(book.levels.data());
    const __mmask16 is_multiple = static_cast<__mmask16>(0xffff << book.num_fixed);
    const __m512 levels = _mm512_mask_mul_ps(all, is_multiple, all, _mm512_set1_ps(scale));
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    _mm512_storeu_ps(to, _mm512_permutexvar_ps(_mm512_and_si512(both, _mm512_set1_epi32(15)), levels));
    _mm512_storeu_ps(to + scale_columns / 2, _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), levels));
}

const auto find_largest = have_avx512() ? largest_at_once : largest;
const auto encode_8_bits = have_avx512() ? to_8_bits_at_once : to_8_bits;
const auto encode_4_bits = have_avx512() ? to_4_bits_at_once : to_4_bits;
const auto decode_4_bits = have_avx512() ? from_4_bits_at_once : from_4_bits;
#else
const auto find_largest = largest;
const auto encode_8_bits = to_8_bits;
const auto encode_4_bits = to_4_bits;
const auto decode_4_bits = from_4_bits;
#endif

// Blocks of a row that are encoded together: what one waits for, the others fill.
constexpr int64_t together = 16;

// Up to `together` blocks.
void encode_blocks(const Format& format, const Codebook& codebook, int64_t count, const float* v, uint8_t* codes,
                   uint8_t* scales) {
    Largest found[together];
    int32_t number[together], of_positive[together];
    for (int64_t b = 0; b < count; ++b) found[b] = find_largest(v + b * scale_columns);
    const int32_t last = static_cast<int32_t>(format.scales.size()) - 1;
    for (int64_t b = 0; b < count; ++b) number[b] = number_of(found[b].of_all, last);
    if (format.bits == 4)
        for (int64_t b = 0; b < count; ++b) of_positive[b] = number_of(found[b].of_positive, last);
    const int64_t bytes = scale_columns * format.bits / 8;
    for (int64_t b = 0; b < count; ++b) {
        const float* const from = v + b * scale_columns;
        uint8_t* const to = codes + b * bytes;
        if (found[b].of_all >= infinity) {
            std::memset(to, 0, bytes);
            scales[b] = not_a_number;
            continue;
        }
        const bool is_own = number[b] >= codebook.first_scale;
        const int64_t own = std::max<int64_t>(of_positive[b], codebook.first_scale);
        const int64_t scale = format.bits == 4 && is_own ? own : number[b];
        if (format.bits == 8)
            encode_8_bits(from, 127.0f / format.scales[scale], to);
        else
            encode_4_bits(from, is_own ? codebook : format.symmetric, 1.0f / format.scales[scale], to);
        scales[b] = static_cast<uint8_t>(scale);
    }
}

void decode_block(const Format& format, const Codebook& codebook, uint8_t scale, const uint8_t* codes, float* to) {
    if (scale == not_a_number) {
        std::fill_n(to, scale_columns, NAN);
    } else if (format.bits == 8) {
        from_8_bits(codes, format.scales[scale] / 127.0f, to);
    } else {
        decode_4_bits(codes, scale >= codebook.first_scale ? codebook : format.symmetric, format.scales[scale], to);
    }
}

int64_t blocks(int64_t columns) { return (columns + scale_columns - 1) / scale_columns; }

int64_t blocks_of_row(const Format& format, int64_t columns) {
    const int64_t parts = format.parts.size();
    return parts * blocks(columns / parts);
}

// Of a column of a part of a row, which block it is.
int64_t block_of(const Kept& kept, int64_t row, int64_t columns, int64_t part, int64_t column) {
    const int64_t of_part = blocks(columns / static_cast<int64_t>(kept.format->parts.size()));
    return row * blocks_of_row(*kept.format, columns) + part * of_part + column / scale_columns;
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
    const Codebook& codebook = format.parts[part];
    const int64_t block = block_of(kept, row, columns, part, column), bytes = scale_columns * format.bits / 8;
    uint8_t *codes = kept.codes + block * bytes, *scales = kept.scales + block;
    const int64_t whole = n / scale_columns;
    for (int64_t b = 0; b < whole; b += together)
        encode_blocks(format, codebook, std::min(together, whole - b), from + b * scale_columns, codes + b * bytes,
                      scales + b);
    if (whole * scale_columns < n) {
        float filled[scale_columns] = {};
        std::memcpy(filled, from + whole * scale_columns, (n - whole * scale_columns) * sizeof(float));
        encode_blocks(format, codebook, 1, filled, codes + whole * bytes, scales + whole);
    }
}

void decode(const Kept& kept, int64_t row, int64_t columns, int64_t part, int64_t column, int64_t n, float* to) {
    const Format& format = *kept.format;
    const int64_t block = block_of(kept, row, columns, part, column), bytes = scale_columns * format.bits / 8;
    const uint8_t *codes = kept.codes + block * bytes, *scales = kept.scales + block;
    for (int64_t j = 0; j < n; j += scale_columns, codes += bytes, ++scales) {
        if (j + scale_columns <= n) {
            decode_block(format, format.parts[part], *scales, codes, to + j);
        } else {
            float filled[scale_columns];
            decode_block(format, format.parts[part], *scales, codes, filled);
            std::memcpy(to + j, filled, (n - j) * sizeof(float));
        }
    }
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
            if (out.type == Type::float16 || kept.matrix.type == Type::float16) saturate_row(columns, values);
            if (out.type != Type::float32) narrow_row(out.type, columns, values, reinterpret_cast<uint16_t*>(to));
        }
    }
}

}  // namespace ewa
