// Which token a grouped row is, computed where it is needed: ewa_kernels/reference.py's random_permutation.
#pragma once

#include "../random.h"
#include "instructions.cuh"

namespace ewa::hopper {

// A permutation that is dealt: `radix_a`, `radix_b` and `rounds` as `kernels/triton/permutation.py` has them.
struct Deal {
    uint64_t seed;
    uint32_t num_rows, radix_a, radix_b, rounds;
};

constexpr int coin_word = 12;

__device__ __forceinline__ uint32_t token_of_row(const Deal& deal, uint32_t row) {
    const uint32_t coin = static_cast<uint32_t>(seed_word(deal.seed, coin_word)) & 1;
    uint32_t point = row < 2 && deal.num_rows > 1 ? row ^ coin : row;
    do {
        uint32_t right = point / deal.radix_a, left = point - right * deal.radix_a;
#pragma unroll 1
        for (uint32_t i = 0; i < deal.rounds / 2; ++i) {
            const uint64_t keys = seed_word(deal.seed, static_cast<int>(i));
            left += multiply_high(mix32(right ^ static_cast<uint32_t>(keys)), deal.radix_a);
            left = left >= deal.radix_a ? left - deal.radix_a : left;
            right += multiply_high(mix32(left ^ static_cast<uint32_t>(keys >> 32)), deal.radix_b);
            right = right >= deal.radix_b ? right - deal.radix_b : right;
        }
        point = right * deal.radix_a + left;
    } while (point >= deal.num_rows);
    return point;
}

// Rows that a product finds by itself: those of x, one for each grouped row of its expert; groups are equal.
struct Gather {
    const void* x;               // [T, K]
    int columns;                 // K
    int num_rows, num_experts;   // grouped rows
    Deal deal;
    const int32_t* permutation;  // [R], of choices, of which each token has `top_k`; null: dealt
    int32_t* dealt;              // [R] or null: where the permutation goes
    int top_k;
};

// First grouped row of an expert, where groups are equal.
EWA_ANYWHERE int64_t first_row_of(int expert, int num_rows, int num_experts) {
    return static_cast<int64_t>(expert) * num_rows / num_experts;
}

}  // namespace ewa::hopper
