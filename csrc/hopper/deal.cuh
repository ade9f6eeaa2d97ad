// Which token a grouped row is, computed where it is needed: ewa_kernels/reference.py's random_permutation.
#pragma once

#include "../random.h"
#include "groups.cuh"
#include "instructions.cuh"
#include "layer.h"

namespace ewa::hopper {

// A permutation that is dealt: `radix_a`, `radix_b` and `rounds` as `kernels/triton/permutation.py` has them.
struct Deal {
    Seed seed;
    uint32_t num_rows, radix_a, radix_b, rounds;
};

__device__ __forceinline__ uint64_t value_of(const Seed& seed) {
    return seed.at != nullptr ? load_constant_u64(seed.at) : seed.value;
}

constexpr int coin_word = 12;

__device__ __forceinline__ uint32_t token_of_row(const Deal& deal, uint32_t row) {
    const uint64_t seed = value_of(deal.seed);
    const uint32_t coin = static_cast<uint32_t>(seed_word(seed, coin_word)) & 1;
    uint32_t point = row < 2 && deal.num_rows > 1 ? row ^ coin : row;
    do {
        uint32_t right = point / deal.radix_a, left = point - right * deal.radix_a;
#pragma unroll 1
        for (uint32_t i = 0; i < deal.rounds / 2; ++i) {
            const uint64_t keys = seed_word(seed, static_cast<int>(i));
            left += multiply_high(mix32(right ^ static_cast<uint32_t>(keys)), deal.radix_a);
            left = left >= deal.radix_a ? left - deal.radix_a : left;
            right += multiply_high(mix32(left ^ static_cast<uint32_t>(keys >> 32)), deal.radix_b);
            right = right >= deal.radix_b ? right - deal.radix_b : right;
        }
        point = right * deal.radix_a + left;
    } while (point >= deal.num_rows);
    return point;
}

// Whose a grouped row is: the permutation that is given, [R], or one that is dealt.
struct Owners {
    Deal deal;
    const int32_t* permutation;  // null: dealt
    int32_t* dealt;              // [R] or null: where the permutation goes
    int top_k;                   // choices of each token

    // One that is given may hold anything: no address made of it leaves the tensors.
    __device__ __forceinline__ int choice(int row) const {
        const int most = static_cast<int>(deal.num_rows) - 1, found = load_global_i32(permutation + row);
        return found < 0 ? 0 : found > most ? most : found;
    }
    __device__ __forceinline__ int token(int row) const {
        return permutation != nullptr ? choice(row) / top_k
                                      : static_cast<int>(token_of_row(deal, static_cast<uint32_t>(row)));
    }
};

// Rows that a product finds by itself: those of x, one for each grouped row of its expert.
struct Gather {
    const void* x;  // [T, K]
    int columns;    // K
    Owners owners;
};

}  // namespace ewa::hopper
