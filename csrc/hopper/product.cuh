// C = A · B for every expert on the tensor cores of sm_90a, and what is done with a tile of it.
//
// One warpgroup loads, by TMA or, rows of x that it finds by itself, by cp.async; two multiply. A cluster is two CTAs,
// whose tiles lie one below the other: each loads half of what both need of B, and sends it to both. The stages of
// operands are a ring; a stage is full when its bytes have arrived, and empty when the warps of both CTAs have read it.
//
// Cooperative: both warpgroups multiply 64 rows each of a tile. Pingpong: each has tiles of its own, and while one
// multiplies, the other does with its tile what is left to do.
#pragma once

#include "deal.cuh"
#include "groups.cuh"
#include "instructions.cuh"
#include "schedule.h"

namespace ewa::hopper {

constexpr int warpgroup_threads = 128, num_threads = 3 * warpgroup_threads;
constexpr int alignment = 1024;  // of stages and slots in shared memory
constexpr int shared_limit = 232448;

// kColumns: of a tile. kMajorA, kMajorB: what is contiguous in memory. kGathers: A is `Gather::x`.
template <Operand kType, Major kMajorA, Major kMajorB, int kColumns, int kStages, bool kPingpong, bool kGathers = false>
struct Shape {
    static constexpr Operand type = kType;
    static constexpr Major major_a = kMajorA, major_b = kMajorB;
    static constexpr int columns = kColumns, stages = kStages;
    static constexpr bool pingpong = kPingpong, gathers = kGathers;
    static constexpr int blocks = pingpong ? 2 : 1;  // of 64 rows, of a warpgroup's tile
    static constexpr uint32_t a_bytes = tile_rows * swizzle_bytes, b_bytes = columns * swizzle_bytes;
    static constexpr uint32_t stage_bytes = a_bytes + b_bytes;
    // Of a thread, from where the roles part; more for all together than there are would never come.
    static constexpr int loading_registers = 40, multiplying_registers = 232;
    static_assert(loading_registers + 2 * multiplying_registers <= 504);
    static_assert(columns % (major_b == Major::mn ? 128 : 16) == 0, "each CTA of a cluster loads half of B");
    static_assert(!gathers || (major_a == Major::k && stages >= 3));
};

// Operands as TMA sees them, [rows of an expert][columns] for each expert, or slots of all: boxes of 64 × 64 for what is
// MN-major and for output, {64 k, 128 rows} for A and {64 k, half a tile's columns} for B that are K-major. `b[1]`: what
// the second CTA loads; the same as b[0] but for gated projections.
template <class Epilogue>
struct Maps {
    TensorMap a, b[2], out[Epilogue::outputs], in[Epilogue::inputs > 0 ? Epilogue::inputs : 1];
};

// What a launch has to do.
template <class Epilogue>
struct Task {
    Maps<Epilogue> maps;
    Work work;
    Groups groups;
    Gather rows;
    typename Epilogue::Arguments arguments;
};

// A product may be one of two in a launch, of which the second reads by TMA what the first stores: bands of 128 rows,
// of which each has a flag. A tile of the first adds 1 when its rows are there, and one of the second when it has seen
// that all are; the last of these leaves 0 behind.
enum class Part { alone, first, second };
struct HandOver {
    uint32_t* flags = nullptr;        // of bands
    int first_columns, last_columns;  // tiles of a band, of the first and of the second product
};

// Named barriers, each of two warpgroups; those of `own_warpgroup` of one.
enum Barrier { turn_to_multiply = 1, turn_to_store = 3, own_warpgroup = 5 };

// `Epilogue`: see epilogues.cuh. kBarriersAt: in shared memory; 0: behind all else.
template <class Shape, class Epilogue, Part kPart = Part::alone, uint32_t kBarriersAt = 0>
struct Product {
    using Accumulators = float[Shape::blocks][Shape::columns / 2];
    // Of output of a warpgroup. One is filled while TMA reads the other; threads are done when the next is begun.
    static constexpr uint32_t slots = Epilogue::scatters || Epilogue::outputs + Epilogue::inputs > 4 ? 1 : 2;
    static constexpr uint32_t slot_bytes = Epilogue::outputs * atom_bytes;
    static constexpr uint32_t input_slots = 2, input_bytes = Epilogue::inputs * atom_bytes;  // of a warpgroup
    static constexpr uint32_t slots_at = Shape::stages * Shape::stage_bytes;
    static constexpr uint32_t inputs_at = slots_at + 2 * slots * slot_bytes;
    static constexpr uint32_t scratch_at = inputs_at + 2 * input_slots * input_bytes;
    static constexpr uint32_t end_of_data = scratch_at + 2 * Epilogue::scratch_bytes;
    static constexpr uint32_t barriers_at = kBarriersAt > 0 ? kBarriersAt : end_of_data;
    static constexpr uint32_t input_barriers_at = barriers_at + 2 * Shape::stages * 8;
    static constexpr uint32_t end_of_barriers = input_barriers_at + (Epilogue::inputs > 0 ? 4 * input_slots * 8 : 0);
    static constexpr int shared_bytes = end_of_barriers + alignment;
    static_assert(shared_bytes <= shared_limit);
    static_assert(Epilogue::scratch_bytes % 16 == 0);
    static constexpr int readers = Shape::pingpong ? 8 : 16;  // warps of both CTAs that read a stage
    static constexpr bool over_rows = Epilogue::sums_rows;
    static constexpr int slices = Shape::columns / Epilogue::slice_columns * Shape::blocks;  // of a warpgroup's tile

    const Task<Epilogue>& task;
    const HandOver& hand_over;
    uint32_t shared, rank;

    // Asked anew each time: kept, it would take a register that epilogues need.
    __device__ __forceinline__ int pairs() const {
        return !over_rows && task.groups.table != nullptr ? num_pairs(task.groups) : task.work.pairs;
    }
    __device__ __forceinline__ int num_tiles() const { return task.work.parts * pairs() * task.work.columns; }
    __device__ __forceinline__ Tile tile(int index) const {
        return tile_at<over_rows>(task.work, task.groups, pairs(), index, static_cast<int>(rank));
    }
    __device__ uint32_t stage(int step) const { return shared + step % Shape::stages * Shape::stage_bytes; }
    __device__ uint32_t full(int step) const { return shared + barriers_at + step % Shape::stages * 8; }
    __device__ uint32_t empty(int step) const { return full(step) + Shape::stages * 8; }
    __device__ static uint32_t parity(int step) { return step / Shape::stages & 1; }
    // Inputs of a warpgroup's slice, and their barriers.
    __device__ uint32_t input(int group, uint32_t slice) const {
        return shared + inputs_at + (group * input_slots + slice % input_slots) * input_bytes;
    }
    __device__ uint32_t input_full(int group, uint32_t slice) const {
        return shared + input_barriers_at + (group * input_slots + slice % input_slots) * 8;
    }
    __device__ uint32_t input_empty(int group, uint32_t slice) const {
        return input_full(group, slice) + 2 * input_slots * 8;
    }
    __device__ static uint32_t input_parity(uint32_t slice) { return slice / input_slots & 1; }
    // Eight columns of ones, for sums over K of the rows of A.
    __device__ uint32_t ones() const { return shared + scratch_at; }
    __device__ static int lane() { return thread_id() % 32; }

    // One thread.
    __device__ __forceinline__ void initialise_barriers() const {
        if (!Shape::gathers) prefetch_tensor_map(&task.maps.a);
        prefetch_tensor_map(&task.maps.b[rank]);
        for (int i = 0; i < Shape::stages; ++i) {
            mbarrier_init(full(i), Shape::gathers ? 1 + warpgroup_threads : 1);
            mbarrier_init(empty(i), readers);
        }
        for (int i = 0; Epilogue::inputs > 0 && i < 4; ++i) {  // two of each warpgroup
            mbarrier_init(input_full(i / 2, i), 1);
            mbarrier_init(input_empty(i / 2, i), warpgroup_threads / 32);
        }
        fence_mbarrier_init();
    }

    __device__ __forceinline__ void initialise() const {
        if (thread_id() == 0) initialise_barriers();
        if constexpr (Epilogue::sums_rows) {
            if (thread_id() < 256) store_shared_u32(ones() + 4 * thread_id(), pack<Shape::type>(1.0f, 1.0f));
            fence_proxy_async_shared();
        }
        begin();
    }

    // What came before has ended, and what it wrote is there, for TMA too.
    __device__ __forceinline__ static void begin() {
        warp_sync();  // what follows is for whole warps
        cluster_sync();
        griddepcontrol_wait();
        fence_proxy_async_global();
        griddepcontrol_launch_dependents();
    }

    // --- the warpgroup that loads ---

    __device__ __forceinline__ void load_a(uint32_t to, int step, const Tile& tile, int k) const {
        if constexpr (Shape::major_a == Major::k) {
            tma_load_3d(to, &task.maps.a, full(step), k, tile.row, tile.place);
        } else {
            for (int i = 0; i < tile_rows / 64; ++i)
                tma_load_3d(to + i * atom_bytes, &task.maps.a, full(step), tile.row + i * 64, k, tile.place);
        }
    }

    // Our half, to both CTAs.
    __device__ __forceinline__ void load_b(uint32_t to, int step, const Tile& tile, int k) const {
        constexpr int half = Shape::columns / 2;
        const int first = Epilogue::b_in_halves ? tile.column * half : tile.column * Shape::columns + rank * half;
        const int place = over_rows ? tile.place : tile.expert;
        const TensorMap* map = &task.maps.b[rank];
        to += rank * (Shape::b_bytes / 2);
        if constexpr (Shape::major_b == Major::k) {
            tma_load_multicast_3d(to, map, full(step), k, first, place, 3);
        } else {
            for (int i = 0; i < half / 64; ++i)
                tma_load_multicast_3d(to + i * atom_bytes, map, full(step), first + i * 64, k, place, 3);
        }
    }

    // One thread.
    __device__ __forceinline__ void load() const {
        int step = 0;
        for (int index = cluster_id(); index < num_tiles(); index += num_clusters()) {
            const Tile tile = this->tile(index);
            if (kPart == Part::second) take_over(tile);
#pragma unroll 1
            for (int i = 0, k = tile.k; i < tile.steps; ++i, k += step_depth, ++step) {
                mbarrier_wait(empty(step), parity(step) ^ 1);
                mbarrier_arrive_expect_tx(full(step), Shape::stage_bytes);
                load_a(stage(step), step, tile, k);
                load_b(stage(step) + Shape::a_bytes, step, tile, k);
            }
        }
        drain(step);
    }

    // Waits for the rows that are multiplied.
    __device__ __forceinline__ void take_over(const Tile& tile) const {
        uint32_t* flag = hand_over.flags + tile.band;
        const auto there = static_cast<uint32_t>(hand_over.first_columns);
        while (load_acquire(flag) < there) back_off();
        fence_proxy_async_global();
        const uint32_t last = there + static_cast<uint32_t>(hand_over.last_columns) - 1;
        if (fetch_add(flag, 1) == last) store_global_u32(flag, 0);
    }

    // When all stages are free, the peer neither writes to us nor arrives here any more.
    __device__ __forceinline__ void drain(int step) const {
        for (const int end = step + Shape::stages; step < end; ++step) mbarrier_wait(empty(step), parity(step) ^ 1);
    }

    // A warpgroup: thread t copies 16 bytes, chunk t mod 8, of rows t / 8 + 16 i. Which tokens they are its warp finds
    // out once for a tile, a row a lane.
    __device__ __forceinline__ void gather() const {
        const int thread = thread_id() - 2 * warpgroup_threads, chunk = thread % 8;
        const int first = thread / 32 * 4, own = first + lane() % 4 + 16 * (lane() / 4);
        const auto* x = static_cast<const char*>(task.rows.x);
        int step = 0;
        for (int index = cluster_id(); index < num_tiles(); index += num_clusters()) {
            const Tile tile = this->tile(index);
            int token = -1;  // there is no such row: zeros
            if (own < tile.size) {
                const int row = tile.start + own;
                token = task.rows.owners.token(row);
                int32_t* dealt = task.rows.owners.dealt;
                if (dealt != nullptr && tile.column == 0) store_global_i32(dealt + row, token);
            }
            uint32_t offsets[8];  // of 16 bytes; all bits: none
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int of_row = shuffle(token, lane() / 8 + 4 * i);
                offsets[i] = of_row < 0 ? ~0u : static_cast<uint32_t>(of_row) * (task.rows.columns / 8) + chunk;
            }
#pragma unroll 1
            for (int k = 0; k < tile.steps * step_depth; k += step_depth, ++step) {
                // Before the wait: with few stages it lasts until those rows have been multiplied.
                if (step >= 2) gathered<1>(step - 2);
                mbarrier_wait(empty(step), parity(step) ^ 1);
                if (thread == 0) {
                    mbarrier_arrive_expect_tx(full(step), Shape::b_bytes);
                    load_b(stage(step) + Shape::a_bytes, step, tile, k);
                }
                const bool inside = k + 8 * chunk < task.rows.columns;
                const uint32_t to = stage(step) + swizzled_offset(thread / 8, chunk);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const bool there = inside && offsets[i] != ~0u;
                    const uint64_t offset = there ? uint64_t{offsets[i]} * 16 + k * 2 : 0;
                    cp_async_16(to + i * 16 * swizzle_bytes, x + offset, there ? 16 : 0);
                }
                cp_async_commit();
            }
        }
        if (step >= 2) gathered<1>(step - 2);
        if (step >= 1) gathered<0>(step - 1);
        if (thread == 0) drain(step);
    }

    // So many groups of copies may still be under way; the one before them is that of `step`. Two steps late, so that
    // it has landed as a rule; the fence is on this side, where it holds up no product.
    template <int kUnderWay>
    __device__ __forceinline__ void gathered(int step) const {
        cp_async_wait<kUnderWay>();
        fence_proxy_async_shared();
        mbarrier_arrive(full(step));
    }

    // One thread, of a warp of its own: what slices read beside the product.
    __device__ __forceinline__ void load_inputs() const {
        int turn = 0;
        for (int index = cluster_id(); index < num_tiles(); index += num_clusters(), ++turn) {
            const Tile tile = this->tile(index);
            const int group = turn % 2;
#pragma unroll 1
            for (int i = 0; i < slices; ++i) {
                const uint32_t slice = turn / 2 * slices + i, barrier = input_full(group, slice);
                const int column = tile.column * Shape::columns + i / Shape::blocks * 64;
                mbarrier_wait(input_empty(group, slice), input_parity(slice) ^ 1);
                mbarrier_arrive_expect_tx(barrier, input_bytes);
                for (int j = 0; j < Epilogue::inputs; ++j)
                    tma_load_3d(input(group, slice) + j * atom_bytes, &task.maps.in[j], barrier, column,
                                tile.row + i % Shape::blocks * 64, tile.place);
            }
        }
    }

    // --- the warpgroups that multiply ---

    // A warp has read a stage: both CTAs' producers are told.
    __device__ __forceinline__ void release(int step) const {
        if (lane() < 2) mbarrier_arrive_cluster(empty(step), lane());
    }

    // kSums: `sums` too, A times ones.
    template <bool kSums>
    __device__ __forceinline__ void multiply(Accumulators& d, float (&sums)[4], int step, int steps, int group) const {
#pragma unroll 1
        for (int i = 0; i < steps; ++i, ++step) {
            mbarrier_wait(full(step), parity(step));
            const uint32_t at = stage(step) + (Shape::pingpong ? 0 : group * atom_bytes);
            const uint64_t a = make_descriptor<Shape::major_a>(at);
            const uint64_t b = make_descriptor<Shape::major_b>(stage(step) + Shape::a_bytes);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < step_depth / 16; ++k) {
                const uint64_t of_a = a + k * descriptor_next_k16<Shape::major_a>;
                const uint64_t of_b = b + k * descriptor_next_k16<Shape::major_b>;
                if constexpr (kSums)
                    wgmma<8, Shape::type, Shape::major_a, Major::k>(sums, of_a, make_descriptor<Major::k>(ones()),
                                                                    i + k > 0);
#pragma unroll
                for (int m = 0; m < Shape::blocks; ++m)
                    wgmma<Shape::columns, Shape::type, Shape::major_a, Shape::major_b>(
                        d[m], of_a + m * descriptor_next_64_rows, of_b, i + k > 0);
            }
            wgmma_commit();
            // The products of this step run on; those of the one before have read their stage.
            wgmma_wait<1>();
            if (i > 0) release(step - 1);
        }
        // In pingpong the other's products are to queue behind ours first.
        if (!Shape::pingpong) finish(d, sums);
    }

    __device__ __forceinline__ void finish(Accumulators& d, float (&sums)[4]) const {
        wgmma_wait<0>();
#pragma unroll
        for (int m = 0; m < Shape::blocks; ++m) pin(d[m]);
        if constexpr (Epilogue::sums_rows) pin(sums);
    }

    // What is done with a tile, in slices of 64 rows × 64 columns of output.
    __device__ __forceinline__ void store(const Accumulators& d, const Tile& tile, int group, int turn,
                                          Epilogue& epilogue) const {
        const bool leads = thread_id() % warpgroup_threads == 0;
        uint32_t count = turn / (Shape::pingpong ? 2 : 1) * slices;  // of this warpgroup's slices
#pragma unroll
        for (int n = 0; n < Shape::columns / Epilogue::slice_columns; ++n)
#pragma unroll
            for (int m = 0; m < Shape::blocks; ++m, ++count) {
                const uint32_t slot = shared + slots_at + (group * slots + count % slots) * slot_bytes;
                if (leads && !Epilogue::scatters) tma_store_wait_read<slots - 1>();
                named_barrier_sync(own_warpgroup + group, warpgroup_threads);
                const int row = (Shape::pingpong ? m : group) * 64;
                if (Epilogue::inputs > 0) mbarrier_wait(input_full(group, count), input_parity(count));
                epilogue.slice(&d[m][n * Epilogue::slice_columns / 2], slot, input(group, count), tile, row, n);
                // Also between what was read from `in` and what TMA writes there next.
                if (!Epilogue::scatters) fence_proxy_async_shared();
                if constexpr (Epilogue::inputs > 0) {
                    warp_sync();
                    if (lane() == 0) mbarrier_arrive(input_empty(group, count));
                }
                named_barrier_sync(own_warpgroup + group, warpgroup_threads);
                constexpr int width = Shape::columns / Epilogue::slice_columns * Epilogue::slice_width;  // of a tile
                const int column = tile.column * width + n * Epilogue::slice_width;
                if constexpr (Epilogue::scatters) {
                    epilogue.scatter(slot, column);
                } else if (leads) {
                    const int place = over_rows ? tile.expert * task.work.splits + tile.split : tile.place;
                    // Past an expert's slots are the next one's.
                    const bool exists = over_rows || row < tile.slots;
#pragma unroll
                    for (int i = 0; i < Epilogue::outputs; ++i)
                        if (exists && i < epilogue.wanted())
                            tma_store_3d(&task.maps.out[i], slot + i * atom_bytes, column, tile.row + row, place);
                    tma_store_commit();
                }
            }
    }

    // One thread, which has stored this warpgroup's tile; asked anew, it takes no register meanwhile.
    __device__ __forceinline__ void give_over(int index) const {
        tma_store_wait<0>();
        fence_proxy_async_global();
        add_release(hand_over.flags + tile(index).band, 1);
    }

    __device__ __forceinline__ void consume(int group) const {
        int step = 0, turn = 0;
        if (Shape::pingpong && group == 1) {  // the first turns are warpgroup 0's
            named_barrier_arrive(turn_to_multiply, 2 * warpgroup_threads);
            named_barrier_arrive(turn_to_store, 2 * warpgroup_threads);
        }
        for (;; ++turn) {
            const int index = cluster_id() + turn * num_clusters();
            if (index >= num_tiles()) break;
            if (Shape::pingpong && turn % 2 != group) continue;
            const Tile tile = this->tile(index);
            const int steps = tile.steps;
            if (!over_rows) step = turn * steps;  // not counted: epilogues need the register
            Epilogue epilogue(task.arguments, shared + scratch_at + group * Epilogue::scratch_bytes);
            // What the second reads there comes with its rows.
            if (kPart != Part::second) epilogue.begin(tile);
            Accumulators d;
            if (Shape::pingpong) named_barrier_sync(turn_to_multiply + group, 2 * warpgroup_threads);
            float sums[4];
            bool with_sums = false;
            if constexpr (Epilogue::sums_rows) with_sums = epilogue.wants_sums(tile);
            // Two loops: a branch around a product would have all of them wait for one another.
            if (Epilogue::sums_rows && with_sums)
                multiply<Epilogue::sums_rows>(d, sums, step, steps, group);
            else
                multiply<false>(d, sums, step, steps, group);
            if (Shape::pingpong) {
                named_barrier_arrive(turn_to_multiply + 1 - group, 2 * warpgroup_threads);
                finish(d, sums);
            }
            release(step + steps - 1);
            if (kPart == Part::second) epilogue.begin(tile);
            if constexpr (Epilogue::sums_rows) {
                if (with_sums) epilogue.put_sums(sums, tile, tile.row + group * 64);
            }
            if (Shape::pingpong) named_barrier_sync(turn_to_store + group, 2 * warpgroup_threads);
            store(d, tile, group, turn, epilogue);
            if (Shape::pingpong) named_barrier_arrive(turn_to_store + 1 - group, 2 * warpgroup_threads);
            if (kPart == Part::first) {
                if (thread_id() % warpgroup_threads == 0) give_over(cluster_id() + turn * num_clusters());
                warp_sync();
            }
            step += steps;
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

    // `warp`: of the warpgroup that loads.
    __device__ __forceinline__ void produce(int warp) const {
        if constexpr (Shape::gathers) {
            gather();
        } else {
            if (warp == 0 && elect_one()) load();
        }
        if constexpr (Epilogue::inputs > 0) {
            static_assert(Shape::pingpong && !Shape::gathers);
            if (warp == 1 && elect_one()) load_inputs();
        }
    }

    __device__ __forceinline__ void run() const {
        initialise();
        const int group = warp_uniform(thread_id() / warpgroup_threads);
        if (group == 2) {
            setmaxnreg_dec<Shape::loading_registers>();
            produce(warp_uniform(thread_id() / 32) % 4);
        } else {
            setmaxnreg_inc<Shape::multiplying_registers>();
            consume(group);
        }
    }
};

// Grid: clusters of two, at most as many as run at once.
template <class Shape, class Epilogue>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(num_threads, 1)
    product_kernel(const __grid_constant__ Task<Epilogue> task) {
    const HandOver none{};
    Product<Shape, Epilogue>{task, none, shared_memory(), cluster_rank()}.run();
}

// Two products, one after the other; see `Part`.
template <class FirstShape, class FirstEpilogue, class SecondShape, class SecondEpilogue>
struct Pair {
    static constexpr uint32_t one = Product<FirstShape, FirstEpilogue, Part::first>::end_of_data;
    static constexpr uint32_t other = Product<SecondShape, SecondEpilogue, Part::second>::end_of_data;
    static constexpr uint32_t barriers_at = one > other ? one : other;
    using First = Product<FirstShape, FirstEpilogue, Part::first, barriers_at>;
    using Second = Product<SecondShape, SecondEpilogue, Part::second, First::end_of_barriers>;
    static constexpr int shared_bytes = Second::shared_bytes;
    static_assert(shared_bytes <= shared_limit);
    static_assert(FirstShape::loading_registers == SecondShape::loading_registers);
    static_assert(FirstShape::multiplying_registers == SecondShape::multiplying_registers);

    const Task<FirstEpilogue>& first_task;
    const Task<SecondEpilogue>& second_task;
    const HandOver& hand_over;

    // Anew for each of the two: kept from one to the other, they would take registers.
    __device__ __forceinline__ First first() const { return {first_task, hand_over, shared_memory(), cluster_rank()}; }
    __device__ __forceinline__ Second second() const {
        return {second_task, hand_over, shared_memory(), cluster_rank()};
    }

    // Nobody reads or writes any more what the first product had in the shared memory of either CTA.
    __device__ __forceinline__ static void change_over() {
        fence_proxy_async_shared();
        cluster_sync();
    }

    __device__ __forceinline__ void run() const {
        if (thread_id() == 0) {
            first().initialise_barriers();
            second().initialise_barriers();
        }
        First::begin();
        const int group = warp_uniform(thread_id() / warpgroup_threads);
        if (group == 2) {
            setmaxnreg_dec<FirstShape::loading_registers>();
            const int warp = warp_uniform(thread_id() / 32) % 4;
            first().produce(warp);
            warp_sync();
            change_over();
            second().produce(warp);
        } else {
            setmaxnreg_inc<FirstShape::multiplying_registers>();
            first().consume(group);
            warp_sync();
            change_over();
            second().consume(group);
        }
    }
};

// Grid: clusters of two, which must all run at once: they wait for one another.
template <class FirstShape, class FirstEpilogue, class SecondShape, class SecondEpilogue>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(num_threads, 1)
    pair_kernel(const __grid_constant__ Task<FirstEpilogue> first, const __grid_constant__ Task<SecondEpilogue> second,
                const __grid_constant__ HandOver hand_over) {
    Pair<FirstShape, FirstEpilogue, SecondShape, SecondEpilogue>{first, second, hand_over}.run();
}

}  // namespace ewa::hopper
