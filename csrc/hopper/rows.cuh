// Rows by slot, for products that take them so.
#pragma once

#include "deal.cuh"
#include "groups.cuh"
#include "instructions.cuh"
#include "layer.h"

namespace ewa::hopper {

constexpr int gather_threads = 256;

struct GatherArguments {
    const void* x;
    Gathered to;
    int columns;
    Owners owners;
    Groups groups;
    int pairs;  // of tiles of an expert; not looked at where groups are given
};

template <Operand kType>
__device__ __forceinline__ uint32_t scaled(uint32_t two, float factor) {
    const float2 v = unpack<kType>(two);
    return pack<kType>(v.x * factor, v.y * factor);
}

// Rows of x and of gradients of y by slot, zeros where there is no row. A CTA, which is a cluster here, takes blocks of
// 64 slots of an expert, and a warp eight slots.
// Grid: any number of CTAs.
template <Operand kType>
__global__ void __launch_bounds__(gather_threads) gather_kernel(const __grid_constant__ GatherArguments with) {
    constexpr int blocks_of_pair = 2 * tile_rows / block_rows, own_slots = 8;
    static_assert(gather_threads / 32 * own_slots == block_rows);
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    const bool is_given = with.groups.table != nullptr;
    const int pairs = is_given ? num_pairs(with.groups) : with.pairs * with.groups.num_experts;
    const int chunks = with.columns / 8, lane = thread_id() % 32, warp = thread_id() / 32;
#pragma unroll 1
    for (int index = cluster_id(); index < pairs * blocks_of_pair; index += num_clusters()) {
        int expert = index / blocks_of_pair / (is_given ? 1 : with.pairs), row = 0;
        if (is_given)
            find_pair(with.groups, index / blocks_of_pair, expert, row);
        else
            row = (index / blocks_of_pair - expert * with.pairs) * 2 * tile_rows;
        row += index % blocks_of_pair * block_rows + warp * own_slots;
        const Group group = group_of(with.groups, expert);
        const int left = group.slots - row;
        if (left <= 0) continue;

        // Of the slot that is this lane's own.
        int token = -1;
        float factor = 0.0f;
        if (lane < own_slots && row + lane < group.size) {
            const int at = group.start + row + lane;
            token = with.owners.token(at);
            if (with.owners.dealt != nullptr) store_global_i32(with.owners.dealt + at, token);
            if (with.to.weighted != nullptr)
                factor = load_constant_f32(with.to.routing_weights + with.owners.choice(at));
        }
        const int64_t first_slot = int64_t{group.place} * group.slots + group.first_slot + row;
        const auto copy = [&](const void* from, void* to, void* weighted) {
#pragma unroll 1
            for (int chunk = lane; chunk - lane < chunks; chunk += 32) {
                uint4 v[own_slots];
#pragma unroll
                for (int i = 0; i < own_slots; ++i) {  // all under way together
                    const int of_slot = shuffle(token, i);
                    v[i] = {0, 0, 0, 0};
                    if (of_slot >= 0 && chunk < chunks)
                        v[i] = load_global_u32x4(static_cast<const uint4*>(from) + int64_t{of_slot} * chunks + chunk);
                }
#pragma unroll
                for (int i = 0; i < own_slots; ++i) {
                    const float of_slot = shuffle(factor, i);
                    if (i >= left || chunk >= chunks) continue;
                    const int64_t at = (first_slot + i) * chunks + chunk;
                    if (to != nullptr) store_global_u32x4(static_cast<uint4*>(to) + at, v[i]);
                    if (weighted != nullptr)
                        store_global_u32x4(static_cast<uint4*>(weighted) + at,
                                           {scaled<kType>(v[i].x, of_slot), scaled<kType>(v[i].y, of_slot),
                                            scaled<kType>(v[i].z, of_slot), scaled<kType>(v[i].w, of_slot)});
                }
            }
        };
        if (with.to.x != nullptr) copy(with.x, with.to.x, nullptr);
        if (with.to.grad_y != nullptr) copy(with.to.grad_y, with.to.of_grad_y, with.to.weighted);
    }
}

}  // namespace ewa::hopper
