// TMA and cp.async within a cluster.
#include "programs.h"

namespace programs {
namespace {

enum class Fault {
    none, too_few_bytes, too_many_bytes, no_wait, misaligned, not_fenced, no_wait_read, no_wait_at_end, no_commit,
    after_exit, over_what_is_read, in_flight_at_end, half_at_one,
};

// The first thread initialises a barrier for the cluster, and is the only one to go on issuing.
template <class Body>
void with_barrier(uint32_t barrier, int arrivals, Body&& body) {
    if (thread_id() == 0) {
        mbarrier_init(barrier, arrivals);
        fence_mbarrier_init();
    }
    cluster_sync();
    body();
}

float bf16_at(uint32_t address) { return unpack<Operand::bf16>(load_shared_u32(address & ~3u) >> address % 4 * 8).x; }

constexpr int rows = 21, columns = 88;

// A box of kRows × kColumns from (kX, kY) on, which may stick out on any side, read back element by element.
template <int kSwizzle, int kX, int kY, Fault kFault = Fault::none>
std::string load_2d(const Options& options) {
    constexpr int box_rows = 16, box_columns = kSwizzle == 0 ? 24 : kSwizzle / 2;
    constexpr uint32_t bytes = box_rows * box_columns * 2;
    Matrix from(rows, columns);
    const TensorMap map = from.map(box_columns, box_rows, kSwizzle);
    std::vector<float> seen(box_rows * box_columns, NAN);
    const std::string said = launch({1, 1, 64, 8192}, options, [&] {
        const uint32_t to = shared_memory() + (kFault == Fault::misaligned ? 64 : 0), barrier = shared_memory() + 4096;
        with_barrier(barrier, 1, [&] {
            if (thread_id() == 0) {
                mbarrier_arrive_expect_tx(barrier, bytes - (kFault == Fault::too_few_bytes ? bytes / 2 : 0) +
                                                       (kFault == Fault::too_many_bytes ? 16 : 0));
                tma_load_2d(to, &map, barrier, kX, kY);
                if (kFault == Fault::too_few_bytes) tma_load_2d(to + 2048, &map, barrier, kX, kY);
            }
            if (kFault != Fault::no_wait && kFault != Fault::in_flight_at_end) mbarrier_wait(barrier, 0);
            if (kFault == Fault::in_flight_at_end) return;
            for (int i = thread_id(); i < box_rows * box_columns; i += 64) {
                const int row = i / box_columns, column = i % box_columns;
                uint32_t offset = static_cast<uint32_t>(i * 2);
                if (kSwizzle == 128) offset = row * 128 + ((column / 8 ^ row % 8) * 16) + column % 8 * 2;
                if (kSwizzle == 64) offset = row * 64 + ((column / 8 ^ row / 2 % 4) * 16) + column % 8 * 2;
                seen[i] = bf16_at(to + offset);
            }
            // The next box: when the other warp has read this one.
            if (kFault != Fault::over_what_is_read) named_barrier_sync(1, 64);
            if (thread_id() == 0 && kFault != Fault::no_wait) {
                mbarrier_arrive_expect_tx(barrier, bytes);
                tma_load_2d(to, &map, barrier, 0, 0);
            }
            if (kFault != Fault::no_wait) mbarrier_wait(barrier, 1);
        });
    });
    return compare(said, seen, [&from](int i) {
        const int row = kY + i / box_columns, column = kX + i % box_columns;
        return row >= 0 && row < rows && column >= 0 && column < columns ? from(row, column) : 0.0f;
    });
}

// Boxes of float32 in three dimensions come and go: a tensor of 5 × 7 × 36 is copied, in boxes of 2 × 4 × 32.
template <Fault kFault>
std::string there_and_back_3d(const Options& options) {
    constexpr int depth = 5, height = 7, width = 36, bytes = 2 * 4 * 32 * 4;
    std::vector<float> from(depth * height * width), to(depth * height * width, NAN);
    for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<float>(i);
    const auto map_of = [](std::vector<float>& t) {
        return make_tensor_map(t.data(), 4, {width, height, depth}, {width * 4, height * width * 4}, {32, 4, 2});
    };
    const TensorMap in = map_of(from), out = map_of(to);
    const std::string said = launch({1, 1, 32, 8192}, options, [&] {
        const uint32_t slots = shared_memory(), barrier = slots + 2 * bytes;
        with_barrier(barrier, 1, [&] {
            if (!elect_one()) return;
            int i = 0;
            for (int z = 0; z < depth; z += 2)
                for (int y = 0; y < height; y += 4)
                    for (int x = 0; x < width; x += 32, ++i) {
                        const uint32_t slot = slots + i % 2 * bytes;
                        if (kFault != Fault::no_wait_read) tma_store_wait_read<1>();
                        mbarrier_arrive_expect_tx(barrier, bytes);
                        tma_load_3d(slot, &in, barrier, x, y, z);
                        mbarrier_wait(barrier, i & 1);
                        tma_store_3d(&out, slot, x, y, z);
                        if (kFault != Fault::no_commit) tma_store_commit();
                    }
            if (kFault != Fault::no_wait_at_end) tma_store_wait_read<0>();
        });
    });
    return compare(said, to, [&from](int i) { return from[i]; });
}

// Threads fill a box, one stores it; and fill it again.
template <Fault kFault>
std::string store_2d(const Options& options) {
    Matrix to(64, 64);
    const TensorMap map = to.map(64, 32);
    const std::string said = launch({1, 1, 64, 8192}, options, [&] {
        const uint32_t box = shared_memory();
        for (int i = 0; i < 2; ++i) {
            if (kFault != Fault::no_wait_read && thread_id() == 0) tma_store_wait_read<0>();
            named_barrier_sync(1, 64);
            for (int chunk = warp_id(); chunk < 8; chunk += 2) {
                const uint32_t v = pack<Operand::bf16>(static_cast<float>(chunk + i), static_cast<float>(lane_id()));
                store_shared_u32x4(box + swizzled_offset(lane_id(), chunk), {v, v, v, v});
            }
            if (kFault != Fault::not_fenced && (kFault != Fault::half_at_one || thread_id() < 32))
                fence_proxy_async_shared();
            named_barrier_sync(1, 64);
            if (thread_id() == 0) {
                tma_store_2d(&map, box, 0, 32 * i);
                tma_store_commit();
            }
        }
        if (thread_id() == 0) tma_store_wait_read<0>();
    });
    std::vector<float> values;
    for (int i = 0; i < 64 * 64; ++i) values.push_back(to(i / 64, i % 64));
    return compare(said, values, [](int i) { return i % 2 ? i / 64 % 32 : i % 64 / 8 + i / 64 / 32; });
}

// Each CTA loads half of a box of 32 rows, for both.
template <Fault kFault, bool k3d = false>
std::string multicast(const Options& options) {
    Matrix from(32, 64);
    const TensorMap halves = make_tensor_map(from.bits.data(), 2, {64, 16, 2}, {128, 2048}, {64, 16, 1});
    const TensorMap map = k3d ? halves : from.map(64, 16);
    std::vector<float> seen(2 * 32 * 64, NAN);
    const std::string said = launch({1, 2, 64, 8192}, options, [&] {
        const uint32_t to = shared_memory(), barrier = to + 4096, rank = cluster_rank();
        with_barrier(barrier, 1, [&] {
            if (kFault == Fault::after_exit && rank == 1) return;
            if (thread_id() == 0) {
                mbarrier_arrive_expect_tx(barrier, kFault == Fault::too_few_bytes ? 2048 : 4096);
                if (kFault == Fault::after_exit)
                    for (int i = 0; i < 1000; ++i) mbarrier_wait(barrier, 1);
                if (k3d)
                    tma_load_multicast_3d(to + rank * 2048, &map, barrier, 0, 0, static_cast<int>(rank), 3);
                else
                    tma_load_multicast_2d(to + rank * 2048, &map, barrier, 0, static_cast<int>(rank) * 16, 3);
            }
            mbarrier_wait(barrier, 0);
            for (int i = thread_id(); i < 32 * 64; i += 64)
                seen[rank * 2048 + i] = bf16_at(to + swizzled_offset(i / 64, i % 64 / 8) + i % 8 * 2);
        });
    });
    return compare(said, seen, [&from](int i) { return from(i / 64 % 32, i % 64); });
}

TensorMap bad_map(Matrix& of, int kind) {
    TensorMap map = of.map(64, 8);
    if (kind == 0) map.base += 8;
    if (kind == 1) map.stride[1] += 8;
    if (kind == 2) map.box[0] = 128;
    if (kind == 3) map.box[0] = 60;
    if (kind == 4) map.rank = 3;
    return map;
}

template <int kKind>
std::string bad_tensor_map(const Options& options) {
    Matrix from(8, 256);
    const TensorMap map = bad_map(from, kKind);
    return launch({1, 1, 32, 8192}, options, [&] {
        const uint32_t to = shared_memory(), barrier = to + 4096;
        with_barrier(barrier, 1, [&] {
            if (elect_one()) {
                mbarrier_arrive_expect_tx(barrier, 1024);
                tma_load_2d(to, &map, barrier, 0, 0);
            }
        });
    });
}

// Rows of 64 bytes, in another order, and of the last chunk only 6 bytes; then read by threads or by a TMA store.
template <bool kByBarrier, bool kByTma, Fault kFault = Fault::none>
std::string gather(const Options& options) {
    Matrix from(32, 32), to(32, 32);
    const TensorMap map = to.map(32, 32, 64);
    std::vector<float> seen(32 * 32, NAN);
    const std::string said = launch({1, 1, 64, 8192}, options, [&] {
        const uint32_t box = shared_memory(), barrier = box + 4096;
        with_barrier(barrier, 32, [&] {
            if (warp_id() == 0) {
                const uint32_t row = lane_id();
                for (uint32_t chunk = 0; chunk < 4; ++chunk) {
                    const uint32_t at = box + row * 64 + ((chunk ^ (row / 2 & 3)) << 4);
                    const auto* source = &from.bits[(31 - row) * 32 + chunk * 8];
                    if (chunk < 3)
                        cp_async_16(at, source);
                    else
                        cp_async_16(at, source, 6);
                }
                if (kByBarrier) {
                    cp_async_mbarrier_arrive(barrier);
                } else {
                    cp_async_commit();
                    if (kFault != Fault::no_wait) cp_async_wait<0>();
                    if (kFault != Fault::not_fenced) fence_proxy_async_shared();
                    mbarrier_arrive(barrier);
                    if (kFault == Fault::no_wait) cp_async_wait<0>();
                }
                return;
            }
            mbarrier_wait(barrier, 0);
            if (kByBarrier && kByTma && kFault != Fault::not_fenced) fence_proxy_async_shared();
            if (kByTma) {
                if (elect_one()) {
                    tma_store_2d(&map, box, 0, 0);
                    tma_store_commit();
                    tma_store_wait<0>();
                }
                warp_sync();
            }
            for (int i = lane_id(); i < 32 * 32; i += 32) {
                const int row = i / 32, column = i % 32;
                seen[i] = kByTma ? to(row, column)
                                 : bf16_at(box + row * 64 + ((column / 8 ^ row / 2 % 4) << 4) + column % 8 * 2);
            }
        });
    });
    return compare(said, seen, [&from](int i) { return i % 32 < 27 ? from(31 - i / 32, i % 32) : 0.0f; });
}

}  // namespace

const std::vector<Program> copy_programs = {
    {"load 2-D: swizzle 128", load_2d<128, 8, 3>},
    {"load 2-D: swizzle 64", load_2d<64, 8, 3>},
    {"load 2-D: no swizzle", load_2d<0, 8, 3>},
    {"load 2-D: clipped left and above", load_2d<128, -13, -5>},
    {"load 2-D: clipped right and below", load_2d<128, 45, 17>},
    {"load 2-D: clipped, swizzle 64", load_2d<64, 67, -3>},
    {"load 2-D: outside", load_2d<0, 88, 0>},
    {"load 2-D: too few bytes", load_2d<128, 0, 0, Fault::too_few_bytes>},
    {"load 2-D: too many bytes", load_2d<128, 0, 0, Fault::too_many_bytes>},
    {"load 2-D: no wait", load_2d<128, 0, 0, Fault::no_wait>},
    {"load 2-D: over what is read", load_2d<128, 0, 0, Fault::over_what_is_read>},
    {"load 2-D: misaligned", load_2d<128, 0, 0, Fault::misaligned>},
    {"load 2-D: in flight at the end", load_2d<128, 0, 0, Fault::in_flight_at_end>},
    {"load and store 3-D", there_and_back_3d<Fault::none>},
    {"load and store 3-D: no wait for reading", there_and_back_3d<Fault::no_wait_read>},
    {"load and store 3-D: no wait at the end", there_and_back_3d<Fault::no_wait_at_end>},
    {"load and store 3-D: not committed", there_and_back_3d<Fault::no_commit>},
    {"store 2-D", store_2d<Fault::none>},
    {"store 2-D: no fence", store_2d<Fault::not_fenced>},
    {"store 2-D: fence by some", store_2d<Fault::half_at_one>},
    {"store 2-D: no wait for reading", store_2d<Fault::no_wait_read>},
    {"multicast", multicast<Fault::none>},
    {"multicast 3-D", multicast<Fault::none, true>},
    {"multicast: bytes of the own half", multicast<Fault::too_few_bytes>},
    {"multicast: after exit", multicast<Fault::after_exit>},
    {"tensor map: misaligned", bad_tensor_map<0>},
    {"tensor map: stride", bad_tensor_map<1>},
    {"tensor map: wider than the swizzle", bad_tensor_map<2>},
    {"tensor map: not whole chunks", bad_tensor_map<3>},
    {"tensor map: rank", bad_tensor_map<4>},
    {"gather", gather<false, false>},
    {"gather: by barrier", gather<true, false>},
    {"gather: by barrier, for TMA", gather<true, true>},
    {"gather: for TMA", gather<false, true>},
    {"gather: no wait", gather<false, false, Fault::no_wait>},
    {"gather: no fence for TMA", gather<false, true, Fault::not_fenced>},
    {"gather: by barrier, no fence for TMA", gather<true, true, Fault::not_fenced>},
};

}  // namespace programs
