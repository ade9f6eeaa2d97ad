// Which tile a cluster works on: known beforehand, so that all roles of a kernel count alike and nobody asks.
#pragma once

#include <cstdint>

#include "../platform.h"

namespace ewa::hopper {

constexpr int tile_rows = 128;  // of a CTA; the two of a cluster have one below the other
constexpr int step_depth = 64;  // of the index that is summed over
constexpr int weight_columns = 256;  // of a tile of a gradient of weights

EWA_ANYWHERE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many tiles, or steps, of a size there are; as many as an int holds.
EWA_ANYWHERE constexpr int tiles_of(int64_t size, int tile) { return static_cast<int>(ceil_div(size, tile)); }

// A [M, K] · B [K, N] of every expert, in pairs of tiles.
struct Work {
    int pairs;        // of tiles of an expert's M rows; the last may have none
    int columns;      // tiles of N
    int num_experts;
    int steps;        // of K, or of the part of it that a tile sums up
    int splits = 1;   // parts of K

    EWA_ANYWHERE int tiles() const { return num_experts * splits * pairs * columns; }
};

struct Tile {
    int expert, split, row, column;  // first row, and column tile
};

// Tile `index` of the CTA of this rank. So many pairs, one after the other, share a column of B in the L2 cache.
EWA_ANYWHERE Tile tile_at(const Work& work, int index, int rank) {
    constexpr int group = 8;
    const int of_part = work.pairs * work.columns;
    const int part = index / of_part, rest = index - part * of_part, expert = part / work.splits;
    const int first = rest / (group * work.columns) * group;
    const int left = work.pairs - first, size = left < group ? left : group;
    const int inside = rest - first * work.columns, column = inside / size;
    return {expert, part - expert * work.splits, ((first + inside - column * size) * 2 + rank) * tile_rows, column};
}

}  // namespace ewa::hopper
