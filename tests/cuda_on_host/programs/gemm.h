// A small GEMM as the real ones are built: C [M, N] = A · B in bfloat16, by clusters of two CTAs which share the loads
// of B. One warpgroup loads, two multiply 64 rows each; the last ones' tiles leave by TMA while the next is multiplied.
#pragma once

#include "hopper/instructions.cuh"

namespace programs {

using namespace ewa::hopper;

enum class Fault {
    none, early_release, no_wait_before_release, wrong_leading, wrong_parity, lost_arrival, no_proxy_fence,
    too_few_bytes, no_wgmma_wait, no_wgmma_fence, no_wait_read, no_init_fence, no_drain, release_by_one_warp,
    wrong_half, no_slot_barrier,
};

template <Major kMajor, int kStages = 3, Fault kFault = Fault::none>
struct Gemm {
    static constexpr int rows = 128, columns = 128, depth = 64;  // of a CTA's tile, and of a step
    static constexpr int consumers = 256, threads = consumers + 128;
    static constexpr uint32_t a_bytes = rows * 128, b_bytes = columns * 128, stage_bytes = a_bytes + b_bytes;
    static constexpr uint32_t slice_bytes = 64 * 128;  // 64 rows × 64 columns
    static constexpr uint32_t slices = kStages * stage_bytes, barriers = slices + 2 * 2 * slice_bytes;
    static constexpr int shared_bytes = barriers + 16 * kStages + 1024;

    const TensorMap &a, &b, &c;
    int steps, tiles_m, tiles_n;  // tiles_m: pairs of tiles
    uint32_t shared, rank;

    __device__ uint32_t stage(int i) const { return shared + i % kStages * stage_bytes; }
    __device__ uint32_t full(int i) const { return shared + barriers + i % kStages * 8; }
    __device__ uint32_t empty(int i) const { return full(i) + kStages * 8; }
    __device__ static uint32_t parity(int i) { return i / kStages & 1; }

    __device__ static uint32_t lane() { return static_cast<uint32_t>(thread_id()) % 32; }

    __device__ void initialise() const {
        if (thread_id() == 0) {
            for (int i = 0; i < kStages; ++i) {
                mbarrier_init(full(i), 1);
                mbarrier_init(empty(i), 2 * consumers / 32);  // a warp's lanes 0 and 1 arrive on both CTAs'
            }
            if (kFault != Fault::no_init_fence) fence_mbarrier_init();
        }
        cluster_sync();
    }

    template <class Body>
    __device__ void for_each_tile(Body&& body) const {
        for (uint32_t tile = cluster_id(); tile < static_cast<uint32_t>(tiles_m * tiles_n); tile += num_clusters())
            body(static_cast<int>((tile % tiles_m * 2 + rank) * rows), static_cast<int>(tile / tiles_m * columns));
    }

    // One thread.
    __device__ void produce() const {
        int i = 0;
        for_each_tile([&](int row, int column) {
            for (int step = 0; step < steps; ++step, ++i) {
                mbarrier_wait(empty(i), parity(i) ^ (kFault == Fault::wrong_parity ? 0 : 1));
                mbarrier_arrive_expect_tx(full(i), stage_bytes - (kFault == Fault::too_few_bytes ? b_bytes / 2 : 0));
                const uint32_t to = stage(i), half = to + a_bytes + rank * (b_bytes / 2);
                const int mine = column + static_cast<int>(kFault == Fault::wrong_half ? rank ^ 1 : rank) * 64;
                if constexpr (kMajor == Major::k) {
                    tma_load_2d(to, &a, full(i), step * depth, row);
                    tma_load_multicast_2d(half, &b, full(i), step * depth, mine, 3);
                } else {
                    for (int j = 0; j < 2; ++j)
                        tma_load_2d(to + j * atom_bytes, &a, full(i), row + j * 64, step * depth);
                    tma_load_multicast_2d(half, &b, full(i), mine, step * depth, 3);
                }
            }
        });
        // When all stages are free, the peer neither writes to us nor arrives here any more.
        if (kFault == Fault::no_drain) return;
        for (int last = i + kStages; i < last; ++i) mbarrier_wait(empty(i), parity(i) ^ 1);
    }

    __device__ void release(int i) const {
        if (kFault == Fault::release_by_one_warp) {
            if (thread_id() / 32 % 4 == 0 && thread_id() % 32 < 8) mbarrier_arrive_cluster(empty(i), lane() & 1);
            return;
        }
        if (lane() < 2) mbarrier_arrive_cluster(empty(i), kFault == Fault::lost_arrival ? rank : lane());
    }

    // One warpgroup; returns the next step.
    __device__ int multiply(float (&d)[columns / 2], int i) const {
        const uint32_t own_rows = static_cast<uint32_t>(warp_uniform(thread_id() / 128)) * 64 * 128;
        for (int step = 0; step < steps; ++step, ++i) {
            mbarrier_wait(full(i), parity(i));
            const uint64_t at_a = make_descriptor<kMajor>(stage(i) + own_rows);
            uint64_t at_b = make_descriptor<kMajor>(stage(i) + a_bytes);
            if (kFault == Fault::wrong_leading) at_b = make_descriptor(stage(i) + a_bytes, 1024, 1024);
            if (kFault != Fault::no_wgmma_fence) wgmma_fence();
#pragma unroll
            for (int k = 0; k < depth / 16; ++k)
                wgmma<columns, Operand::bf16, kMajor, kMajor>(d, at_a + k * descriptor_next_k16<kMajor>,
                                                              at_b + k * descriptor_next_k16<kMajor>, step + k > 0);
            wgmma_commit();
            if (kFault == Fault::early_release) {
                release(i);
                continue;
            }
            if (kFault != Fault::no_wait_before_release) wgmma_wait<1>();
            if (step > 0) release(i - 1);
        }
        if (kFault != Fault::no_wgmma_wait) wgmma_wait<0>();
        pin(d);
        if (kFault != Fault::early_release) release(i - 1);
        return i;
    }

    // 64 rows × 128 columns by slices of 64 columns, through two slots.
    __device__ void store(const float (&d)[columns / 2], int row, int column) const {
        const int group = warp_uniform(thread_id() / 128), first = thread_id() % 128 == 0;
        const uint32_t own_row = thread_id() % 128 / 32 * 16 + (lane() & 15);
#pragma unroll
        for (int slice = 0; slice < 2; ++slice) {
            const uint32_t slot = shared + slices + static_cast<uint32_t>(group * 2 + slice) * slice_bytes;
            if (first && kFault != Fault::no_wait_read) tma_store_wait_read<1>();
            if (kFault != Fault::no_slot_barrier) named_barrier_sync(1 + group, 128);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float* v = &d[slice * 32 + j * 8];
                stmatrix_x4(slot + swizzled_offset(own_row, 2 * j + (lane() >> 4)), pack<Operand::bf16>(v[0], v[1]),
                            pack<Operand::bf16>(v[2], v[3]), pack<Operand::bf16>(v[4], v[5]),
                            pack<Operand::bf16>(v[6], v[7]));
            }
            if (kFault != Fault::no_proxy_fence) fence_proxy_async_shared();
            named_barrier_sync(1 + group, 128);
            if (first) {
                tma_store_2d(&c, slot, column + slice * 64, row + group * 64);
                tma_store_commit();
            }
        }
    }

    __device__ void run() const {
        initialise();
        if (warp_uniform(thread_id() / 128) == 2) {
            setmaxnreg_dec<40>();
            if (warp_uniform(thread_id() / 32) == consumers / 32 && elect_one()) produce();
        } else {
            setmaxnreg_inc<232>();
            int i = 0;
            for_each_tile([&](int row, int column) {
                float d[columns / 2];
                i = multiply(d, i);
                store(d, row, column);
            });
            if (thread_id() % 128 == 0) tma_store_wait_read<0>();
            if (kFault == Fault::no_wgmma_wait) wgmma_wait<0>();
        }
    }
};

// Grid: any number of clusters of two.
template <Major kMajor, int kStages = 3, Fault kFault = Fault::none>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    gemm(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, const __grid_constant__ TensorMap c,
         int steps, int tiles_m, int tiles_n) {
    Gemm<kMajor, kStages, kFault>{a, b, c, steps, tiles_m, tiles_n, shared_memory(), cluster_rank()}.run();
}

}  // namespace programs
