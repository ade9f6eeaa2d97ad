// mbarriers, named barriers, the cluster's barrier, flags, and how a launch that hangs is reported.
#include "programs.h"

namespace programs {
namespace {

constexpr int rounds = 5;

enum class Fault {
    none, no_wait, no_wait_to_write, wrong_parity, not_initialised, no_init_fence, no_init_barrier,
    lost_arrival, second_arrive, no_arrive, wrong_count, odd_count, no_such_barrier, half_a_warp, never_set,
    wrong_order,
};

// Warp 0 writes a number for each lane, warp 1 adds it up, through one slot that two barriers guard.
template <Fault kFault, bool kPolls = false>
std::string phases(const Options& options) {
    std::vector<float> sums(32, 0.0f);
    const std::string said = launch({1, 1, 64, 4096}, options, [&] {
        const uint32_t full = shared_memory(), empty = full + 8, slot = full + 128 + 4 * lane_id();
        if (thread_id() == 0 && kFault != Fault::not_initialised) {
            mbarrier_init(full, 32);
            mbarrier_init(empty, 32);
        }
        if (kFault != Fault::no_init_barrier) named_barrier_sync(0, 64);
        for (int i = 0; i < rounds; ++i) {
            const uint32_t parity = i & 1;
            if (warp_id() == 0) {
                if (kFault != Fault::no_wait_to_write) mbarrier_wait(empty, parity ^ 1);
                store_shared_f32(slot, static_cast<float>(i + lane_id()));
                mbarrier_arrive(full);
            } else {
                if (kPolls)
                    while (!mbarrier_try_wait(full, parity)) continue;
                else if (kFault != Fault::no_wait)
                    mbarrier_wait(full, kFault == Fault::wrong_parity ? parity ^ 1 : parity);
                sums[lane_id()] += load_shared_f32(slot);
                mbarrier_arrive(empty);
            }
        }
    });
    return compare(said, sums, [](int lane) { return rounds * lane + rounds * (rounds - 1) / 2; });
}

std::string too_many_arrivals(const Options& options) {
    return launch({1, 1, 32, 4096}, options, [&] {
        const uint32_t barrier = shared_memory();
        if (thread_id() == 0) {
            mbarrier_init(barrier, 1);
            mbarrier_arrive_expect_tx(barrier, 64);
            mbarrier_arrive(barrier);
        }
    });
}

// Both CTAs tell each other and themselves.
template <Fault kFault>
std::string both_ctas(const Options& options) {
    return launch({3, 2, 64, 4096}, options, [&] {
        const uint32_t barrier = shared_memory();
        if (thread_id() == 0) {
            mbarrier_init(barrier, 2);
            if (kFault != Fault::no_init_fence) fence_mbarrier_init();
        }
        if (kFault == Fault::no_init_barrier)
            named_barrier_sync(0, 64);
        else
            cluster_sync();
        for (int i = 0; i < rounds; ++i) {
            const bool lost = kFault == Fault::lost_arrival && i == rounds - 1 && cluster_rank() == 1;
            if (thread_id() == 0) {  // on the own first: who sees ours there has what it needs itself
                mbarrier_arrive(barrier);
                if (!lost) mbarrier_arrive_cluster(barrier, cluster_rank() ^ 1);
            }
            mbarrier_wait(barrier, i & 1);
            named_barrier_sync(1, 64);  // else thread 0 may be two phases ahead of one that has not looked yet
        }
        cluster_sync();
    });
}

// CTA 1 ends; the barrier that CTA 0 then arrives on is gone.
std::string arrival_after_exit(const Options& options) {
    return launch({1, 2, 32, 4096}, options, [&] {
        const uint32_t barrier = shared_memory();
        if (thread_id() == 0) {
            mbarrier_init(barrier, 1);
            fence_mbarrier_init();
        }
        cluster_sync();
        if (cluster_rank() == 1) return;
        if (thread_id() == 0) {
            for (int i = 0; i < 1000; ++i) mbarrier_wait(barrier, 1);  // lets the others run
            mbarrier_arrive_cluster(barrier, 1);
        }
    });
}

template <Fault kFault>
std::string cluster_barrier(const Options& options) {
    return launch({2, 2, 64, 4096}, options, [&] {
        for (int i = 0; i < rounds; ++i) {
            if (kFault != Fault::no_arrive) cluster_arrive();
            if (kFault == Fault::second_arrive) cluster_arrive();
            cluster_wait();
        }
    });
}

// Warp 0 lets warps 1 … 3 read what it wrote; they let it write again.
template <Fault kFault>
std::string named_barriers(const Options& options) {
    std::vector<float> sums(128, 0.0f);
    const std::string said = launch({1, 1, 128, 4096}, options, [&] {
        const uint32_t slot = shared_memory() + 4 * lane_id();
        const int first = kFault == Fault::no_such_barrier ? 16 : 1;
        for (int i = 0; i < rounds; ++i) {
            if (warp_id() == 0) {
                if (i > 0 && kFault == Fault::no_wait_to_write)
                    named_barrier_arrive(2, 128);
                else if (i > 0)
                    named_barrier_sync(2, 128);
                store_shared_f32(slot, static_cast<float>(i));
                named_barrier_arrive(first, kFault == Fault::odd_count ? 120 : 128);
            } else {
                if (kFault == Fault::half_a_warp && lane_id() < 16) continue;
                if (kFault != Fault::no_wait) named_barrier_sync(first, kFault == Fault::wrong_count ? 96 : 128);
                sums[thread_id()] += load_shared_f32(slot);
                if (i < rounds - 1) named_barrier_arrive(2, 128);
            }
        }
    });
    return compare(said, sums, [](int thread) { return thread < 32 ? 0 : rounds * (rounds - 1) / 2; });
}

// Each cluster waits for the one before it, which started before it: with room for two CTAs that is one to come.
template <Fault kFault>
std::string flags(const Options& options) {
    constexpr int clusters = 7;
    std::vector<uint32_t> ready(clusters + 1, 0);
    alignas(16) static float memory[4 * (clusters + 1)];
    std::vector<float> last(1, 0.0f);
    for (float& v : memory) v = 1.0f;
    Options two = options;
    two.ctas_at_once = 2;
    const std::string said = launch({clusters, 1, 32, 4096}, two, [&] {
        const uint32_t id = cluster_id();
        if (!elect_one()) return;
        const uint32_t awaited = kFault == Fault::wrong_order ? id + 1 : id - 1;
        const bool waits = kFault == Fault::wrong_order ? id + 1 < clusters : id > 0;
        uint4 sum{0, 0, 0, 0};
        if (waits) {
            if (kFault != Fault::no_wait)
                while (load_acquire(&ready[awaited]) == 0) continue;
            sum = load_global_u32x4(&memory[4 * awaited]);
        }
        sum.x += id + 1;
        last[0] = static_cast<float>(sum.x);
        store_global_u32x4(&memory[4 * id], sum);
        fence_gpu();
        if (kFault != Fault::never_set || id != 3) add_release(&ready[id], 1);
    });
    return compare(said, last, [](int) { return clusters * (clusters + 1) / 2; });
}

// Said to be: who waits, for what, and what is missing.
std::string who_waits(const Options& options) {
    return launch({1, 2, 96, 4096}, options, [&] {
        const uint32_t barrier = shared_memory() + 8;
        if (thread_id() == 0) mbarrier_init(barrier, 3);
        named_barrier_sync(0, 96);
        if (cluster_rank() == 0) return;
        if (thread_id() == 0) mbarrier_arrive_expect_tx(barrier, 256);
        if (warp_id() == 2)
            mbarrier_wait(barrier, 0);
        else
            named_barrier_sync(4, 96);
    });
}

}  // namespace

const std::vector<Program> barrier_programs = {
    {"phases", phases<Fault::none>},
    {"phases, polled", phases<Fault::none, true>},
    {"phases: no wait", phases<Fault::no_wait>},
    {"phases: no wait to write", phases<Fault::no_wait_to_write>},
    {"phases: wrong parity", phases<Fault::wrong_parity>},
    {"phases: not initialised", phases<Fault::not_initialised>},
    {"phases: no barrier after initialisation", phases<Fault::no_init_barrier>},
    {"too many arrivals", too_many_arrivals},
    {"both CTAs", both_ctas<Fault::none>},
    {"both CTAs: no fence after initialisation", both_ctas<Fault::no_init_fence>},
    {"both CTAs: no cluster barrier after initialisation", both_ctas<Fault::no_init_barrier>},
    {"both CTAs: a lost arrival", both_ctas<Fault::lost_arrival>},
    {"arrival after exit", arrival_after_exit},
    {"cluster barrier", cluster_barrier<Fault::none>},
    {"cluster barrier: arrives twice", cluster_barrier<Fault::second_arrive>},
    {"cluster barrier: does not arrive", cluster_barrier<Fault::no_arrive>},
    {"named barriers", named_barriers<Fault::none>},
    {"named barriers: no wait", named_barriers<Fault::no_wait>},
    {"named barriers: no wait to write", named_barriers<Fault::no_wait_to_write>},
    {"named barriers: mismatched counts", named_barriers<Fault::wrong_count>},
    {"named barriers: not whole warps", named_barriers<Fault::odd_count>},
    {"named barriers: number 16", named_barriers<Fault::no_such_barrier>},
    {"named barriers: half a warp", named_barriers<Fault::half_a_warp>},
    {"flags", flags<Fault::none>},
    {"flags: no wait", flags<Fault::no_wait>},
    {"flags: never set", flags<Fault::never_set>},
    {"flags: of clusters that cannot start", flags<Fault::wrong_order>},
    {"who waits", who_waits},
};

}  // namespace programs
