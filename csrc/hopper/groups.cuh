// Which grouped rows an expert has, and in which slots they lie.
//
// Groups are equal, and slots [E, ⌈R/E⌉]; or they are given, and each expert has as many blocks of 64 slots as its rows
// need, one expert's after the other's. In a slot without a row x and gradients are 0.
#pragma once

#include "instructions.cuh"
#include "schedule.h"

namespace ewa::hopper {

// `table`: null where groups are equal, else what `tabulate_kernel` writes: the number of pairs of tiles, for each expert
// its first row, the number of its rows and its first slot, and for each pair its expert and its first row there.
struct Groups {
    int num_rows, num_experts;
    const int32_t* table;
};

struct Group {
    int start, size;  // first grouped row, and how many
    int place;        // of the expert in tensors [E, slots, …]; where groups are given, these are [1, slots, …]
    int first_slot, slots;
};

__device__ __forceinline__ Group group_of(const Groups& groups, int expert) {
    if (groups.table == nullptr) {
        const auto first_row = [&](int64_t e) { return static_cast<int>(e * groups.num_rows / groups.num_experts); };
        const int start = first_row(expert);
        return {start, first_row(expert + 1) - start, expert, 0, (groups.num_rows - 1) / groups.num_experts + 1};
    }
    const int32_t* of_expert = groups.table + 1 + 3 * expert;
    const int size = load_global_i32(of_expert + 1);
    return {load_global_i32(of_expert), size, 0, load_global_i32(of_expert + 2),
            tiles_of(size, block_rows) * block_rows};
}

// How many pairs of tiles all experts have together, and where a pair is.
__device__ __forceinline__ int num_pairs(const Groups& groups) { return load_global_i32(groups.table); }
__device__ __forceinline__ void find_pair(const Groups& groups, int pair, int& expert, int& row) {
    const int32_t* at = groups.table + 1 + 3 * groups.num_experts + 2 * pair;
    expert = load_global_i32(at);
    row = load_global_i32(at + 1);
}

// The sum of this lane's value and those of the lanes before it, or the largest. Aligned.
template <class Join>
__device__ __forceinline__ int scan(int value, Join&& join) {
    const int lane = thread_id() % 32;
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = shuffle(value, (lane + 32 - distance) % 32);
        if (lane >= distance) value = join(other, value);
    }
    return value;
}

// Whatever offsets [E + 1] are given: in the table they rise from 0 to R. One warp.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    tabulate_kernel(const int32_t* expert_offsets, int num_rows, int num_experts, int32_t* table) {
    static_assert(kThreads == 32);
    griddepcontrol_wait();
    const auto add = [](int a, int b) { return a + b; };
    const auto larger = [](int a, int b) { return a > b ? a : b; };
    int rows = 0, blocks = 0, pairs = 0;  // of the experts so far
#pragma unroll 1
    for (int first = 0; first < num_experts; first += 32) {
        const int lane = thread_id() % 32, expert = first + lane;
        const bool exists = expert < num_experts;
        int end = expert + 1 < num_experts ? load_global_i32(expert_offsets + expert + 1) : num_rows;
        end = scan(larger(rows, end < num_rows ? end : num_rows), larger);
        const int before = shuffle(end, (lane + 31) % 32), start = lane == 0 ? rows : before, size = end - start;
        const int own_blocks = exists ? tiles_of(size, block_rows) : 0, to_block = blocks + scan(own_blocks, add);
        const int own_pairs = exists ? tiles_of(size, 2 * tile_rows) : 0, to_pair = pairs + scan(own_pairs, add);
        if (exists) {
            int32_t* of_expert = table + 1 + 3 * expert;
            store_global_i32(of_expert, start);
            store_global_i32(of_expert + 1, size);
            store_global_i32(of_expert + 2, (to_block - own_blocks) * block_rows);
            int32_t* of_pair = table + 1 + 3 * num_experts + 2 * (to_pair - own_pairs);
            for (int i = 0; i < own_pairs; ++i) {
                store_global_i32(of_pair + 2 * i, expert);
                store_global_i32(of_pair + 2 * i + 1, i * 2 * tile_rows);
            }
        }
        rows = shuffle(end, 31);
        blocks = shuffle(to_block, 31);
        pairs = shuffle(to_pair, 31);
    }
    if (thread_id() == 0) store_global_i32(table, pairs);
}

// A tile of C, in pairs of which the second CTA of a cluster has the lower one. What it has of an expert's rows is
// counted from its first one.
struct Tile {
    int expert, split, column;  // column: the how manieth tile
    int row, place;  // where it is: in a gradient of weights, or in [places, slots, …]
    int band;        // of 128 rows, the how manieth of all
    int start, size, slots;  // first grouped row, how many rows follow, and how many slots
    int k, steps;  // where the sum begins, and its length
};

// Tile `index` of the CTA of this rank. So many pairs, one after the other, share a column of B in the L2 cache.
// kOverRows: C is a gradient of weights, and K are slots; `pairs`: of tiles of an expert, or of all where groups are
// given.
template <bool kOverRows>
__device__ __forceinline__ Tile tile_at(const Work& work, const Groups& groups, int pairs, int index, int rank) {
    constexpr int together = 8;
    const bool is_given = groups.table != nullptr;
    const int of_part = pairs * work.columns;
    const int part = index / of_part, rest = index - part * of_part;
    const int first = rest / (together * work.columns) * together;
    const int left = pairs - first, size = left < together ? left : together;
    const int inside = rest - first * work.columns, column = inside / size, pair = first + inside - column * size;
    int expert = part / work.splits, row = pair * 2 * tile_rows;
    if (!kOverRows && is_given) find_pair(groups, pair, expert, row);
    row += rank * tile_rows;
    const Group group = group_of(groups, expert);
    const int band = (part * pairs + pair) * 2 + rank;
    Tile tile{expert, part - expert * work.splits, column, row, group.place, band, 0, 0, 0, 0, work.steps};
    if constexpr (!kOverRows) {
        tile.row = group.first_slot + row;
        tile.start = group.start + row;
        tile.size = group.size - row;
        tile.slots = group.slots - row;
    } else {
        tile.k = tile.split * work.steps * step_depth;
        if (is_given) {
            const int blocks = group.slots / block_rows, longest = (blocks + work.splits - 1) / work.splits;
            const int begin = tile.split * longest, end = begin + longest < blocks ? begin + longest : blocks;
            // A part without rows is a step past all slots, where TMA finds zeros.
            const bool has_rows = begin < end;
            tile.k = has_rows ? group.first_slot + begin * block_rows
                              : slots_of(groups.num_rows, groups.num_experts, true);
            tile.steps = has_rows ? end - begin : 1;
        }
    }
    return tile;
}

}  // namespace ewa::hopper
