// Sizes that the host and the kernels must agree on.
#pragma once

#include <cstdint>

#include "../platform.h"

namespace ewa::hopper {

constexpr int tile_rows = 128;  // of a CTA; the two of a cluster have one below the other
constexpr int step_depth = 64;  // of the index that is summed over
constexpr int block_rows = 64;  // slots of an expert come in so many, where groups are given
constexpr int weight_columns = 256;  // of a tile of a gradient of weights
static_assert(block_rows == step_depth, "a step over rows is of one expert");

EWA_ANYWHERE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many tiles, or steps, of a size there are; as many as an int holds.
EWA_ANYWHERE constexpr int tiles_of(int64_t size, int tile) { return static_cast<int>(ceil_div(size, tile)); }

// Slots of all experts: no more are needed, whatever groups are given.
EWA_ANYWHERE constexpr int slots_of(int num_rows, int num_experts, bool is_given) {
    return is_given ? (num_rows / block_rows + num_experts) * block_rows
                    : tiles_of(num_rows, num_experts) * num_experts;
}

// Pairs of tiles of an expert's rows; of all experts' where groups are given, and then no more than that.
EWA_ANYWHERE constexpr int pairs_of(int num_rows, int num_experts, bool is_given) {
    return is_given ? num_rows / (2 * tile_rows) + num_experts
                    : tiles_of(tiles_of(num_rows, num_experts), 2 * tile_rows);
}

// Numbers in the table of groups that are given, see groups.cuh.
EWA_ANYWHERE constexpr int64_t table_size(int num_rows, int num_experts) {
    return 1 + int64_t{3} * num_experts + int64_t{2} * pairs_of(num_rows, num_experts, true);
}

// A [M, K] · B [K, N] of every expert: known beforehand, so that all roles of a kernel count alike and nobody asks.
struct Work {
    int pairs;        // of tiles of M, the last may have none; where groups are given, of all experts, at most
    int columns;      // tiles of N
    int parts;        // experts that have so many pairs, times splits
    int steps;        // of K, or of the part of it that a tile sums up
    int splits = 1;   // parts of K

    EWA_ANYWHERE int tiles() const { return parts * pairs * columns; }
};

}  // namespace ewa::hopper
