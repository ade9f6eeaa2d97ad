// Running a grid.
#pragma once

#include <map>

#include "copies.h"
#include "products.h"

namespace ewa::machine {

// A CTA's last thread has ended.
inline void check_end(Cta& cta) {
    if (cta.loads_in_flight > 0) fail("a CTA ends while TMA loads to it are in flight");
    for (Fibre* fibre : cta.fibres) {
        if (!fibre->copies.empty()) fail("a CTA ends while its cp.async are in flight");
        if (!fibre->open_stores.stores.empty()) fail("a CTA ends with a TMA store that was not committed");
        for (StoreGroup& group : fibre->store_groups) {
            if (!group.waited_read) fail("a CTA ends before its TMA stores have read shared memory");
            for (Store& store : group.stores) state.read_stores.push_back(std::move(store));
        }
        fibre->store_groups.clear();
        state.written_global.insert(state.written_global.end(), fibre->written_global.begin(),
                                      fibre->written_global.end());
        fibre->written_global.clear();
    }
    for (const auto& [address, barrier] : cta.mbarriers)
        if (barrier.bytes != 0)
            fail("a CTA ends while mbarrier " + std::to_string(address) + " expects " + std::to_string(barrier.bytes) +
                 " more bytes (expect_tx)");
    for (size_t i = 0; i < cta.named.size(); ++i)
        if (cta.named[i].arrived > 0) fail("a CTA ends while named barrier " + std::to_string(i) + " waits for others");
    for (size_t i = 0; i < cta.warps.size(); ++i) {
        const Warpgroup& warpgroup = cta.warpgroups[i / 4];
        if (!cta.warps[i].products.empty()) fail("a CTA ends with wgmma that nobody waited for");
        if (cta.warps[i].shapes != warpgroup.shapes.size()) fail("warps of a warpgroup differ in the number of wgmma");
        if (cta.warps[i].changes != warpgroup.changes.size())
            fail("warps of a warpgroup differ in the number of setmaxnreg");
    }
}

inline void run_thread() {
    state.kernel();
    Fibre& fibre = self();
    Cta& cta = *fibre.cta;
    Warp& warp = own_warp();
    if (warp.arrived > 0) fail(std::string("diverged: a lane ends while others are in ") + warp.instruction);
    ++warp.ended;
    ++state.progress;
    fibre.done = true;
    ++cta.cluster->barrier.ended;
    complete_if_done(*cta.cluster);
    if (--cta.running == 0) check_end(cta);
    leave();
}

inline void start(Cluster& cluster, int id) {
    const Grid& grid = state.grid;
    const int most = std::min(256, 65536 / grid.threads / 8 * 8);
    cluster.id = id;
    cluster.barrier = {};
    cluster.alive = true;
    for (auto& cta : cluster.ctas) {
        cta->running = grid.threads;
        cta->generic.assign(static_cast<size_t>(grid.shared_bytes), 0xFF);  // NaN in every type
        cta->async = cta->generic;
        cta->writers.assign(static_cast<size_t>(grid.shared_bytes / 4), {});
        cta->readers.assign(cta->writers.size(), 0);
        cta->async_reads.assign(cta->writers.size(), 0);
        cta->read_epochs.resize(cta->writers.size() * cta->warps.size());
        cta->mbarriers.clear();
        cta->named = {};
        cta->free_registers = 0;
        cta->register_requests.clear();
        std::vector<Stamp> stamps;
        for (const Warp& warp : cta->warps) stamps.push_back(warp.now);
        cta->warps = std::vector<Warp>(stamps.size());
        cta->warpgroups = std::vector<Warpgroup>((stamps.size() + 3) / 4);
        for (size_t i = 0; i < stamps.size(); ++i) {
            cta->warps[i].now = stamps[i];
            cta->warps[i].registers = state.options.registers > 0 ? state.options.registers : most;
        }
        for (Fibre* fibre : cta->fibres) {
            const Context context = fibre->context;
            const int thread = fibre->thread;
            *fibre = Fibre{};
            fibre->context = context;
            fibre->thread = thread;
            fibre->cta = cta.get();
            fibre->context.start(run_thread);
            state.ready.push_back(fibre);
        }
    }
}

// Fibres and their stacks are kept from launch to launch.
inline Fibre* new_fibre(size_t number) {
    static std::vector<std::unique_ptr<Fibre>> all;
    while (all.size() <= number) all.push_back(std::make_unique<Fibre>());
    return all[number].get();
}

inline void build(const Grid& grid) {
    const int at_once = std::min(grid.clusters, state.options.ctas_at_once / grid.cluster_size);
    size_t fibres = 0;
    uint32_t warps = 0;
    for (int i = 0; i < at_once; ++i) {
        state.clusters.push_back(std::make_unique<Cluster>());
        for (int rank = 0; rank < grid.cluster_size; ++rank) {
            auto cta = std::make_unique<Cta>();
            cta->cluster = state.clusters.back().get();
            cta->rank = rank;
            cta->warps = std::vector<Warp>(static_cast<size_t>(grid.threads / 32));
            for (Warp& warp : cta->warps) warp.now = {warps++, 1};
            for (int thread = 0; thread < grid.threads; ++thread) {
                cta->fibres.push_back(new_fibre(fibres++));
                cta->fibres.back()->thread = thread;
            }
            cta->cluster->ctas.push_back(std::move(cta));
        }
    }
}

inline void start_clusters() {
    for (auto& cluster : state.clusters) {
        const auto ended = [](const auto& cta) { return cta->running == 0; };
        cluster->alive = !std::all_of(cluster->ctas.begin(), cluster->ctas.end(), ended);
        if (!cluster->alive && state.next_cluster < state.grid.clusters) start(*cluster, state.next_cluster++);
    }
}

// What may happen without a thread: loads, copies that land, and products if they may come at any time.
inline bool something_happens(bool by_itself) {
    std::vector<std::pair<Cta*, int>> products;
    const auto may = [by_itself](When when) { return !by_itself || when == When::random; };
    const size_t loads = may(state.options.tma) ? state.loads.size() : 0;
    const size_t copies = may(state.options.cp_async) ? state.copying.size() : 0;
    if (state.options.wgmma == When::random)
        for (auto& cluster : state.clusters)
            for (auto& cta : cluster->ctas)
                for (size_t i = 0; i < cta->warps.size(); ++i)
                    if (!cta->warps[i].products.empty()) products.emplace_back(cta.get(), static_cast<int>(i));
    const size_t all = loads + copies + products.size();
    if (all == 0) return false;
    ++state.progress;
    size_t i = state.random() % all;
    if (i < loads) {
        const Load load = state.loads[i];
        state.loads[i] = state.loads.back();
        state.loads.pop_back();
        complete(load);
    } else if (i - loads < copies) {
        land_one(*state.copying[i - loads]);
    } else {
        execute_one(*products[i - loads - copies].first, products[i - loads - copies].second);
    }
    return true;
}

// Some warps are slower than others for a while, and then others are.
inline uint32_t speed(const Fibre& fibre) {
    const uint64_t key = (now(fibre).warp + 1ull) << 32 | state.switches >> 12 << 8 | (state.options.seed & 255);
    return static_cast<uint32_t>(key * 0x9E3779B97F4A7C15ull >> 32) * 2654435761u >> 8;
}

inline void run_one() {
    const auto any = [] { return state.random() % state.ready.size(); };
    size_t i = any();
    const uint32_t candidates = state.options.seed % 4 == 0 ? 1 : 3 + state.options.seed % 2 * 2;
    for (uint32_t more = 1; more < candidates; ++more) {
        const size_t other = any();
        if (speed(*state.ready[other]) > speed(*state.ready[i])) i = other;
    }
    state.current = state.ready[i];
    state.ready[i] = state.ready.back();
    state.ready.pop_back();
    Fibre& fibre = *state.current;
    state.scheduler.go_to(fibre.context);
    state.current = nullptr;
    if (fibre.done && fibre.cta->running == 0) start_clusters();
}

// Who waits for what, threads of a warp that wait for the same together.
inline std::string who_waits() {
    std::string all;
    int threads = 0;
    for (auto& cluster : state.clusters)
        for (auto& cta : cluster->ctas)
            for (size_t warp = 0; warp < cta->warps.size(); ++warp) {
                std::map<std::string, int> reasons;
                for (size_t lane = 0; lane < 32; ++lane) {
                    const Fibre& fibre = *cta->fibres[warp * 32 + lane];
                    if (fibre.done || cta->running == 0) continue;
                    const Reason& reason = fibre.reason;
                    std::string text = reason.what;
                    if (reason.number >= 0) text += " " + std::to_string(reason.number);
                    if (reason.barrier != nullptr)
                        text += " parity " + std::to_string(reason.detail) + " (phase " +
                                std::to_string(reason.barrier->phase) + " lacks " +
                                std::to_string(reason.barrier->pending) + " arrivals and " +
                                std::to_string(reason.barrier->bytes) + " bytes)";
                    else if (reason.detail >= 0)
                        text += " of " + std::to_string(reason.detail) + " threads";
                    ++reasons[text];
                    ++threads;
                }
                for (const auto& [text, lanes] : reasons)
                    all += "\n  " + place(*cta) + " warp " + std::to_string(warp) + ", " + std::to_string(lanes) +
                           " lanes: " + text;
            }
    return std::to_string(threads) + " threads wait:" + all;
}

inline void run_all() {
    uint64_t seen = 0;
    int rounds = 0;  // of spinning, in which nothing happened
    while (state.error.empty()) {
        if (state.switches > state.options.max_switches) return fail("no end in sight; " + who_waits());
        if (state.progress != seen) rounds = 0;
        seen = state.progress;
        if (!state.ready.empty()) {
            if (state.random() % 4 != 0 || !something_happens(true)) run_one();
        } else if (!something_happens(false)) {
            if (state.spinning.empty() || ++rounds > 3) break;
            state.ready.swap(state.spinning);
        }
    }
    for (auto& cluster : state.clusters)
        for (auto& cta : cluster->ctas)
            if (cta->running > 0) return fail((rounds > 3 ? "livelock: " : "deadlock: ") + who_waits());
    for (Store& store : state.read_stores) complete(store);
}

// Runs kernel() for every thread of the grid. Returns what was wrong, or an empty string.
template <class Kernel>
std::string launch(const Grid& grid, const Options& options, Kernel&& kernel) {
    if (options.ctas_at_once < grid.cluster_size) return "fewer multiprocessors than a cluster has CTAs";
    if (grid.clusters < 1 || grid.cluster_size < 1 || grid.cluster_size > 2) return "clusters";
    if (grid.threads < 32 || grid.threads > 1024 || grid.threads % 32 != 0) return "number of threads";
    if (grid.shared_bytes < 0 || grid.shared_bytes > max_shared_bytes || grid.shared_bytes % 16 != 0)
        return "too much shared memory";
    state = Machine{};
    state.options = options;
    state.grid = grid;
    state.kernel = kernel;
    state.random.seed(options.seed);
    state.elected = static_cast<int>(state.random() % 32);
    build(grid);
    start_clusters();
    run_all();
    return state.error;
}

}  // namespace ewa::machine
