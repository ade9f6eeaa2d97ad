// C = A · B for every expert on the tensor cores of sm_90a, and what is done with a tile of it.
//
// One warpgroup loads by TMA, two multiply. A cluster is two CTAs, whose tiles lie one below the other: each loads half
// of what both need of B, and sends it to both. The stages of operands are a ring; a stage is full when its bytes have
// arrived, and empty when the warps of both CTAs have read it.
//
// Cooperative: both warpgroups multiply 64 rows each of a tile. Pingpong: each has tiles of its own, and while one
// multiplies, the other does with its tile what is left to do.
#pragma once

#include "instructions.cuh"
#include "schedule.h"

namespace ewa::hopper {

constexpr int warpgroup_threads = 128, num_threads = 3 * warpgroup_threads;
constexpr int alignment = 1024;  // of stages and slots in shared memory
constexpr int shared_limit = 232448;

// kColumns: of a tile. kMajorA, kMajorB: what is contiguous in memory.
template <Operand kType, Major kMajorA, Major kMajorB, int kColumns, int kStages, bool kPingpong>
struct Shape {
    static constexpr Operand type = kType;
    static constexpr Major major_a = kMajorA, major_b = kMajorB;
    static constexpr int columns = kColumns, stages = kStages;
    static constexpr bool pingpong = kPingpong;
    static constexpr int blocks = pingpong ? 2 : 1;  // of 64 rows, of a warpgroup's tile
    static constexpr uint32_t a_bytes = tile_rows * swizzle_bytes, b_bytes = columns * swizzle_bytes;
    static constexpr uint32_t stage_bytes = a_bytes + b_bytes;
    // Of a thread, from where the roles part; more for all together than there are would never come.
    static constexpr int loading_registers = 40, multiplying_registers = 232;
    static_assert(loading_registers + 2 * multiplying_registers <= 504);
    static_assert(columns % (major_b == Major::mn ? 128 : 16) == 0, "each CTA of a cluster loads half of B");
};

// Operands as TMA sees them, [rows of an expert][columns] for each expert: boxes of 64 × 64 for what is MN-major and
// for output, {64 k, 128 rows} for A and {64 k, half a tile's columns} for B that are K-major. `b[1]`: what the second
// CTA loads; the same as b[0] but for gated projections.
template <int kOutputs>
struct Maps {
    TensorMap a, b[2], out[kOutputs];
};

// Named barriers. Number 0 is that of all threads.
enum Barrier { turn_to_multiply = 1, turn_to_store = 3, own_warpgroup = 5 };

// `Epilogue`: see epilogues.cuh.
template <class Shape, class Epilogue>
struct Product {
    using Accumulators = float[Shape::blocks][Shape::columns / 2];
    // Of output of a warpgroup. One is filled while TMA reads the other; threads are done when the next is begun.
    static constexpr uint32_t slots = Epilogue::scatters ? 1 : 2;
    static constexpr uint32_t slot_bytes = Epilogue::outputs * atom_bytes;
    static constexpr uint32_t slots_at = Shape::stages * Shape::stage_bytes;
    static constexpr uint32_t scratch_at = slots_at + 2 * slots * slot_bytes;
    static constexpr uint32_t barriers_at = scratch_at + 2 * Epilogue::scratch_bytes;
    static constexpr int shared_bytes = barriers_at + 2 * Shape::stages * 8 + alignment;
    static_assert(shared_bytes <= shared_limit);
    static_assert(Epilogue::scratch_bytes % 16 == 0);
    static constexpr int readers = Shape::pingpong ? 8 : 16;  // warps of both CTAs that read a stage

    const Work& work;
    const Maps<Epilogue::outputs>& maps;
    const typename Epilogue::Arguments& arguments;
    uint32_t shared, rank;

    __device__ uint32_t stage(int step) const { return shared + step % Shape::stages * Shape::stage_bytes; }
    __device__ uint32_t full(int step) const { return shared + barriers_at + step % Shape::stages * 8; }
    __device__ uint32_t empty(int step) const { return full(step) + Shape::stages * 8; }
    __device__ static uint32_t parity(int step) { return step / Shape::stages & 1; }
    __device__ static int lane() { return thread_id() % 32; }

    __device__ __forceinline__ void initialise() const {
        if (thread_id() == 0) {
            for (int i = 0; i < Shape::stages; ++i) {
                mbarrier_init(full(i), 1);
                mbarrier_init(empty(i), readers);
            }
            fence_mbarrier_init();
        }
        cluster_sync();
    }

    // --- the warpgroup that loads ---

    __device__ __forceinline__ void load_a(uint32_t to, int step, const Tile& tile, int k) const {
        if constexpr (Shape::major_a == Major::k) {
            tma_load_3d(to, &maps.a, full(step), k, tile.row, tile.expert);
        } else {
            for (int i = 0; i < tile_rows / 64; ++i)
                tma_load_3d(to + i * atom_bytes, &maps.a, full(step), tile.row + i * 64, k, tile.expert);
        }
    }

    // Our half, to both CTAs.
    __device__ __forceinline__ void load_b(uint32_t to, int step, const Tile& tile, int k) const {
        constexpr int half = Shape::columns / 2;
        const int first = Epilogue::gated ? tile.column * half : tile.column * Shape::columns + rank * half;
        const TensorMap* map = &maps.b[rank];
        to += rank * (Shape::b_bytes / 2);
        if constexpr (Shape::major_b == Major::k) {
            tma_load_multicast_3d(to, map, full(step), k, first, tile.expert, 3);
        } else {
            for (int i = 0; i < half / 64; ++i)
                tma_load_multicast_3d(to + i * atom_bytes, map, full(step), first + i * 64, k, tile.expert, 3);
        }
    }

    // One thread.
    __device__ __forceinline__ void load() const {
        int step = 0;
        for (int index = cluster_id(); index < work.tiles(); index += num_clusters()) {
            const Tile tile = tile_at(work, index, rank);
#pragma unroll 1
            for (int k = 0; k < work.steps * step_depth; k += step_depth, ++step) {
                mbarrier_wait(empty(step), parity(step) ^ 1);
                mbarrier_arrive_expect_tx(full(step), Shape::stage_bytes);
                load_a(stage(step), step, tile, k);
                load_b(stage(step) + Shape::a_bytes, step, tile, k);
            }
        }
        // When all stages are free, the peer neither writes to us nor arrives here any more.
        for (const int end = step + Shape::stages; step < end; ++step) mbarrier_wait(empty(step), parity(step) ^ 1);
    }

    // --- the warpgroups that multiply ---

    // A warp has read a stage: both CTAs' producers are told.
    __device__ __forceinline__ void release(int step) const {
        if (lane() < 2) mbarrier_arrive_cluster(empty(step), lane());
    }

    __device__ __forceinline__ void multiply(Accumulators& d, int step, int group) const {
#pragma unroll 1
        for (int i = 0; i < work.steps; ++i, ++step) {
            mbarrier_wait(full(step), parity(step));
            const uint32_t at = stage(step) + (Shape::pingpong ? 0 : group * atom_bytes);
            const uint64_t a = make_descriptor<Shape::major_a>(at);
            const uint64_t b = make_descriptor<Shape::major_b>(stage(step) + Shape::a_bytes);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < step_depth / 16; ++k)
#pragma unroll
                for (int m = 0; m < Shape::blocks; ++m)
                    wgmma<Shape::columns, Shape::type, Shape::major_a, Shape::major_b>(
                        d[m], a + m * descriptor_next_64_rows + k * descriptor_next_k16<Shape::major_a>,
                        b + k * descriptor_next_k16<Shape::major_b>, i + k > 0);
            wgmma_commit();
            // The products of this step run on; those of the one before have read their stage.
            wgmma_wait<1>();
            if (i > 0) release(step - 1);
        }
    }

    // What is done with a tile, in slices of 64 rows × 64 columns of output.
    __device__ __forceinline__ void store(const Accumulators& d, const Tile& tile, int group, uint32_t& count,
                                          Epilogue& epilogue) const {
        const bool leads = thread_id() % warpgroup_threads == 0;
#pragma unroll
        for (int n = 0; n < Shape::columns / Epilogue::slice_columns; ++n)
#pragma unroll
            for (int m = 0; m < Shape::blocks; ++m, ++count) {
                const uint32_t slot = shared + slots_at + (group * slots + count % slots) * slot_bytes;
                if (leads && !Epilogue::scatters) tma_store_wait_read<1>();
                named_barrier_sync(own_warpgroup + group, warpgroup_threads);
                const int row = tile.row + (Shape::pingpong ? m : group) * 64;
                epilogue.slice(&d[m][n * Epilogue::slice_columns / 2], slot, tile, row, n);
                if (!Epilogue::scatters) fence_proxy_async_shared();
                named_barrier_sync(own_warpgroup + group, warpgroup_threads);
                constexpr int width = Shape::columns / Epilogue::slice_columns * 64;  // of output, of a tile
                const int column = tile.column * width + n * 64;
                if constexpr (Epilogue::scatters) {
                    epilogue.scatter(slot, tile, row, column);
                } else if (leads) {
#pragma unroll
                    for (int i = 0; i < Epilogue::outputs; ++i)
                        if (i < arguments.wanted)
                            tma_store_3d(&maps.out[i], slot + i * atom_bytes, column, row, tile.expert);
                    tma_store_commit();
                }
            }
    }

    __device__ __forceinline__ void consume(int group) const {
        int step = 0, turn = 0;
        uint32_t count = 0;
        if (Shape::pingpong && group == 1) {  // the first turns are warpgroup 0's
            named_barrier_arrive(turn_to_multiply, 2 * warpgroup_threads);
            named_barrier_arrive(turn_to_store, 2 * warpgroup_threads);
        }
        for (int index = cluster_id(); index < work.tiles(); index += num_clusters(), step += work.steps) {
            if (Shape::pingpong && turn++ % 2 != group) continue;
            const Tile tile = tile_at(work, index, rank);
            Epilogue epilogue(arguments, shared + scratch_at + group * Epilogue::scratch_bytes);
            epilogue.begin(tile);
            Accumulators d;
            if (Shape::pingpong) named_barrier_sync(turn_to_multiply + group, 2 * warpgroup_threads);
            multiply(d, step, group);
            // The other's products queue behind ours.
            if (Shape::pingpong) named_barrier_arrive(turn_to_multiply + 1 - group, 2 * warpgroup_threads);
            wgmma_wait<0>();
#pragma unroll
            for (int m = 0; m < Shape::blocks; ++m) pin(d[m]);
            release(step + work.steps - 1);
            if (Shape::pingpong) named_barrier_sync(turn_to_store + group, 2 * warpgroup_threads);
            store(d, tile, group, count, epilogue);
            if (Shape::pingpong) named_barrier_arrive(turn_to_store + 1 - group, 2 * warpgroup_threads);
        }
        if (Shape::pingpong) take_last_turns(group, turn);
        if (thread_id() % warpgroup_threads == 0 && !Epilogue::scatters) tma_store_wait_read<0>();
    }

    // A barrier that some have arrived at and nobody waits for would be left at the end.
    __device__ __forceinline__ void take_last_turns(int group, int turns) const {
        if (turns % 2 != group) return;
        named_barrier_sync(turn_to_multiply + group, 2 * warpgroup_threads);
        named_barrier_sync(turn_to_store + group, 2 * warpgroup_threads);
    }

    __device__ __forceinline__ void run() const {
        initialise();
        const int group = warp_uniform(thread_id() / warpgroup_threads);
        if (group == 2) {
            setmaxnreg_dec<Shape::loading_registers>();
            if (warp_uniform(thread_id() / 32) == 2 * warpgroup_threads / 32 && elect_one()) load();
        } else {
            setmaxnreg_inc<Shape::multiplying_registers>();
            consume(group);
        }
    }
};

// Grid: clusters of two, at most as many as run at once.
template <class Shape, class Epilogue>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(num_threads, 1)
    product_kernel(const __grid_constant__ Maps<Epilogue::outputs> maps, const __grid_constant__ Work work,
                   const __grid_constant__ typename Epilogue::Arguments arguments) {
    Product<Shape, Epilogue>{work, maps, arguments, shared_memory(), cluster_rank()}.run();
}

}  // namespace ewa::hopper
