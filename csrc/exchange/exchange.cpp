#include "exchange.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "platform.h"

namespace ewa {
namespace {

constexpr float least_scale = 0x1p-120f;  // so that no quotient by it overflows
constexpr uint16_t not_a_number = 0x7fc0;

float widened(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// The smallest bfloat16 that is no less than a positive number.
uint16_t rounded_up(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0xffff) >> 16);
}

EWA_CLONES uint32_t largest(const float* v) {
    uint32_t found = 0;
#pragma omp simd reduction(max : found)
    for (int64_t j = 0; j < exchange_block; ++j) {
        uint32_t bits;
        std::memcpy(&bits, v + j, 4);
        found = std::max(found, bits & 0x7fffffffu);
    }
    return found;
}

EWA_CLONES void encode_block(const float* v, float scale, int8_t* codes) {
#pragma omp simd
    for (int64_t j = 0; j < exchange_block; ++j) {
        const float code = std::floor(v[j] / scale + 0.5f);
        codes[j] = static_cast<int8_t>(static_cast<int32_t>(std::min(std::max(code, -127.0f), 127.0f)));
    }
}

EWA_CLONES void decode_block(const int8_t* codes, float scale, float* to) {
#pragma omp simd
    for (int64_t j = 0; j < exchange_block; ++j) to[j] = static_cast<float>(codes[j]) * scale;
}

EWA_CLONES void add_block(const int8_t* codes, float scale, float* to) {
#pragma omp simd
    for (int64_t j = 0; j < exchange_block; ++j) to[j] += static_cast<float>(codes[j]) * scale;
}

// What is finite stays so.
void store(float* from, int64_t n, const Matrix& to, int64_t at) {
    const float most = to.type == Type::float16 ? 65504.0f : to.type == Type::bfloat16 ? 0x1.fep127f : 0x1.fffffep127f;
    for (int64_t j = 0; j < n; ++j) from[j] = from[j] > most ? most : from[j] < -most ? -most : from[j];
    convert({from, Type::float32}, 0, n, to, at);
}

}  // namespace

void encode_gradient(Matrix from, int64_t n, int8_t* codes, uint16_t* scales, float* residual) {
    const int64_t blocks = (n + exchange_block - 1) / exchange_block;
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * exchange_block, count = std::min(exchange_block, n - first);
        float v[exchange_block] = {}, decoded[exchange_block];
        convert(from, first, count, {v, Type::float32}, 0);
        if (residual != nullptr)
            for (int64_t j = 0; j < count; ++j) v[j] += residual[first + j];
        const uint32_t found = largest(v);
        int8_t* const to = codes + first;
        if (found >= 0x7f800000u) {  // nothing of it is known, and nothing was lost
            std::memset(to, 0, exchange_block);
            scales[block] = not_a_number;
            continue;
        }
        float most;
        std::memcpy(&most, &found, 4);
        scales[block] = rounded_up(std::max(most / 127.0f, least_scale));
        const float scale = widened(scales[block]);
        encode_block(v, scale, to);
        if (residual == nullptr) continue;
        decode_block(to, scale, decoded);
        for (int64_t j = 0; j < count; ++j) residual[first + j] = v[j] - decoded[j];
    }
}

void decode_gradient(const int8_t* codes, const uint16_t* scales, int64_t n, Matrix to) {
    const int64_t blocks = (n + exchange_block - 1) / exchange_block;
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * exchange_block;
        float v[exchange_block];
        decode_block(codes + first, widened(scales[block]), v);
        store(v, std::min(exchange_block, n - first), to, first);
    }
}

void sum_gradients(const int8_t* codes, const uint16_t* scales, int64_t count, int64_t stride, int64_t n, float factor,
                   float* to) {
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < n / exchange_block; ++block) {
        float* const sum = to + block * exchange_block;
        std::fill_n(sum, exchange_block, 0.0f);
        for (int64_t rank = 0; rank < count; ++rank) {
            uint16_t scale;
            std::memcpy(&scale, reinterpret_cast<const char*>(scales + block) + rank * stride, 2);
            add_block(codes + block * exchange_block + rank * stride, widened(scale), sum);
        }
        for (int64_t j = 0; j < exchange_block; ++j) sum[j] *= factor;
    }
}

}  // namespace ewa
