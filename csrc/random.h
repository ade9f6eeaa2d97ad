// Random bits by hashing: specified by ewa_kernels/reference.py, whose numbers these are.
#pragma once

#include <cstdint>

#include "platform.h"

namespace ewa {

EWA_ANYWHERE uint64_t mix64(uint64_t z) {
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

EWA_ANYWHERE uint32_t mix32(uint32_t h) {
    h = (h ^ h >> 16) * 0x85EBCA6Bu;
    h = (h ^ h >> 13) * 0xC2B2AE35u;
    return h ^ h >> 16;
}

// The i-th word of a seed, which are two 32-bit keys of ewa_kernels/reference.py. The first 13 are for the permutation's
// rounds, or for rounding; that after them is for dropout.
constexpr int dropout_word = 13;
EWA_ANYWHERE uint64_t seed_word(uint64_t seed, int i) { return mix64(seed + (i + 1) * 0x9E3779B97F4A7C15u); }

// 16 random bits for element k of an expert: mix32(mix32(expert ^ key₀) + mix32(k/2 ^ key₁)), the lower or upper half.
struct RandomKeys {
    uint32_t expert, element;

    RandomKeys() = default;
    EWA_ANYWHERE explicit RandomKeys(uint64_t seed)
        : expert(static_cast<uint32_t>(seed_word(seed, 0))), element(static_cast<uint32_t>(seed_word(seed, 0) >> 32)) {}
    EWA_ANYWHERE uint32_t of_expert(int64_t number) const { return mix32(static_cast<uint32_t>(number) ^ expert); }
    EWA_ANYWHERE uint32_t of_element(int64_t k) const { return mix32(static_cast<uint32_t>(k >> 1) ^ element); }
};

EWA_ANYWHERE uint32_t random_bits(uint32_t of_expert, uint32_t of_element, int64_t k) {
    return mix32(of_expert + of_element) >> (k & 1) * 16 & 0xFFFFu;
}

// What hidden dropout multiplies an element of `hidden` by: 0 where mix32(mix32(row ^ key₀) + mix32(column ^ key₁)) is
// below p·2^32, else 1/(1 − p). Rows are grouped rows.
struct DropoutKeys {
    uint32_t row, column;

    EWA_ANYWHERE explicit DropoutKeys(uint64_t seed)
        : row(static_cast<uint32_t>(seed_word(seed, dropout_word))), column(static_cast<uint32_t>(seed_word(seed, dropout_word) >> 32)) {}
    EWA_ANYWHERE uint32_t of_row(int64_t i) const { return mix32(static_cast<uint32_t>(i) ^ row); }
    EWA_ANYWHERE uint32_t of_column(int64_t j) const { return mix32(static_cast<uint32_t>(j) ^ column); }
};

EWA_ANYWHERE uint32_t dropout_bits(uint32_t of_row, uint32_t of_column) { return mix32(of_row + of_column); }

}  // namespace ewa
