// A tile that one CTA writes to global memory and another reads by TMA, when a flag says that it is there.
#include "programs.h"

namespace programs {
namespace {

enum class Fault { none, no_fence, only_read, no_flag, flag_early };

constexpr int tile_rows = 32, tiles = 6;

// Cluster i makes tile i from tile i - 1, adding 1 to each element. Tiles are stored by TMA or by threads.
template <bool kByTma, bool kReaderFences, Fault kFault = Fault::none>
std::string hand_off(const Options& options) {
    Matrix x(tiles * tile_rows, 64);
    const Matrix before = x;
    const TensorMap map = x.map(64, tile_rows);
    std::vector<uint32_t> ready(tiles, 0);
    Options three = options;
    three.ctas_at_once = 3;
    const std::string said = launch({tiles, 1, 64, 16384}, three, [&] {
        const uint32_t in = shared_memory(), out = in + 4096, full = in + 8192, tile = cluster_id();
        if (thread_id() == 0) {
            mbarrier_init(full, 1);
            fence_mbarrier_init();
        }
        named_barrier_sync(0, 64);
        if (thread_id() == 0) {
            if (kFault != Fault::no_flag && tile > 0) {
                while (load_acquire(&ready[tile - 1]) == 0) continue;
                if (kReaderFences && kFault != Fault::no_fence) fence_proxy_async_global();
            }
            mbarrier_arrive_expect_tx(full, 4096);
            tma_load_2d(in, &map, full, 0, tile == 0 ? 0 : static_cast<int>(tile - 1) * tile_rows);
        }
        mbarrier_wait(full, 0);
        for (int chunk = warp_id(); chunk < 8; chunk += 2) {
            const uint32_t at = swizzled_offset(lane_id(), chunk);
            const auto more = [](uint32_t pair) {
                const float2 v = unpack<Operand::bf16>(pair);
                return pack<Operand::bf16>(v.x + 1, v.y + 1);
            };
            uint4 v = load_shared_u32x4(in + at);
            v = {more(v.x), more(v.y), more(v.z), more(v.w)};
            if (kByTma)
                store_shared_u32x4(out + at, v);
            else
                store_global_u32x4(&x.bits[(tile * tile_rows + lane_id()) * 64 + chunk * 8], v);
        }
        if (kByTma)
            fence_proxy_async_shared();
        else if (!kReaderFences && kFault != Fault::no_fence)
            fence_proxy_async_global();
        if (kFault == Fault::flag_early && thread_id() == 0) add_release(&ready[tile], 1);
        named_barrier_sync(0, 64);
        if (thread_id() != 0) return;
        if (kByTma) {
            tma_store_2d(&map, out, 0, static_cast<int>(tile) * tile_rows);
            tma_store_commit();
            if (kFault == Fault::only_read)
                tma_store_wait_read<0>();
            else
                tma_store_wait<0>();
            fence_proxy_async_global();
        } else {
            fence_gpu();
        }
        if (kFault != Fault::flag_early) add_release(&ready[tile], 1);
    });
    std::vector<float> values;
    for (int i = 0; i < tiles * tile_rows * 64; ++i) values.push_back(x(i / 64, i % 64));
    return compare(said, values, [&before](int i) {
        const int row = i / 64;
        return before(row % tile_rows, i % 64) + row / tile_rows + 1;
    });
}

}  // namespace

const std::vector<Program> hand_off_programs = {
    {"hand-off by TMA", hand_off<true, true>},
    {"hand-off by threads, the writer fences", hand_off<false, false>},
    {"hand-off by threads, the reader fences", hand_off<false, true>},
    {"hand-off by TMA: waits for reading only", hand_off<true, true, Fault::only_read>},
    {"hand-off by TMA: no wait for the flag", hand_off<true, true, Fault::no_flag>},
    {"hand-off by TMA: flag before the store", hand_off<true, true, Fault::flag_early>},
    {"hand-off by threads: no fence", hand_off<false, false, Fault::no_fence>},
    {"hand-off by threads: flag before others wrote", hand_off<false, true, Fault::flag_early>},
};

}  // namespace programs
