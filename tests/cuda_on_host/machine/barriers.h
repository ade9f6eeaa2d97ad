// mbarriers, named barriers, the cluster's barrier, and flags in global memory.
#pragma once

#include "warps.h"

namespace ewa::machine {

inline Cta* cta_of_cluster(uint32_t rank) {
    Cluster& cluster = *own_cta().cluster;
    if (rank < cluster.ctas.size()) return cluster.ctas[rank].get();
    fail("no CTA of rank " + std::to_string(rank) + " in the cluster");
    return nullptr;
}

// As a thread, or TMA for it, may use it: `elsewhere` is for TMA, and for a barrier of the peer.
inline Mbarrier& mbarrier_at(Cta& cta, uint32_t address, bool elsewhere) {
    shared_index(cta, address, 8, 8);
    Mbarrier& barrier = cta.mbarriers[address];
    if (barrier.initialised_by == nullptr) fail("mbarrier " + std::to_string(address) + " is not initialised");
    if (elsewhere && !barrier.fenced)
        fail("mbarrier " + std::to_string(address) + ": no fence_mbarrier_init before TMA or the peer uses it");
    if (barrier.initialised_by != state.current && !knows(self(), barrier.initialised))
        fail("mbarrier " + std::to_string(address) + ": no barrier between its initialisation and this use");
    return barrier;
}

inline void complete_if_done(Mbarrier& barrier) {
    if (barrier.pending < 0) fail("mbarrier: more arrivals than it was initialised with");
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    barrier.pending = barrier.arrivals;
    ++barrier.phase;
    barrier.completed = barrier.arriving;
    wake(barrier.waiters);
}

inline void arrive(Mbarrier& barrier, Fibre& fibre, int64_t bytes = 0) {
    release(fibre, barrier.arriving);
    barrier.bytes += bytes;
    if (barrier.bytes >= 1 << 20) fail("mbarrier: 2^20 bytes or more are expected");
    --barrier.pending;
    complete_if_done(barrier);
}

inline bool is_over(const Mbarrier& barrier, uint32_t parity) {
    if (parity > 1) fail("mbarrier: parity " + std::to_string(parity));
    return barrier.phase % 2 != parity;
}

// All 32 lanes come at once; with `wait` they wait.
inline void named_barrier(const char* instruction, int id, int threads, bool wait) {
    preempt();
    own_warp().in[self().lane()][0] = static_cast<uint32_t>(id);
    own_warp().in[self().lane()][1] = static_cast<uint32_t>(threads);
    const auto act = [id, threads, wait](Warp& warp) -> Waiters* {
        const std::string name = "named barrier " + std::to_string(id);
        for (const auto& in : warp.in)
            if (in[0] != warp.in[0][0] || in[1] != warp.in[0][1]) fail(name + ": lanes differ");
        if (id < 0 || id > 15) fail(name + ": there are 0 … 15");
        if (threads <= 0 || threads % 32 != 0 || threads > state.grid.threads)
            fail(name + ": number of threads " + std::to_string(threads));
        NamedBarrier& barrier = own_cta().named[id];
        if (barrier.arrived > 0 && barrier.needed != threads)
            fail(name + ": mismatched counts " + std::to_string(barrier.needed) + " and " + std::to_string(threads));
        barrier.needed = threads;
        for (int lane = 0; lane < 32; ++lane) release(lane_of_own_warp(lane), barrier.arriving);
        barrier.arrived += 32;
        if (barrier.arrived < barrier.needed) return wait ? &barrier.waiters : nullptr;
        barrier.arrived = 0;
        barrier.completed = barrier.arriving;
        wake(barrier.waiters);
        return nullptr;
    };
    together(instruction, act, {instruction, id, threads});
    if (wait) learn(own_cta().named[id].completed);
}

inline void complete_if_done(Cluster& cluster) {
    ClusterBarrier& barrier = cluster.barrier;
    const int threads = state.grid.threads * state.grid.cluster_size;
    if (barrier.arrived == 0 || barrier.arrived + barrier.ended < threads) return;
    barrier.arrived = 0;
    ++barrier.phase;
    barrier.completed = barrier.arriving;
    wake(barrier.waiters);
}

}  // namespace ewa::machine

namespace ewa::hopper {

inline void mbarrier_init(uint32_t address, uint32_t arrivals) {
    machine::Cta& cta = machine::own_cta();
    machine::shared_index(cta, address, 8, 8);
    if (arrivals == 0 || arrivals >= 1 << 20) machine::fail("mbarrier_init: number of arrivals");
    machine::Mbarrier& barrier = cta.mbarriers[address];
    barrier = {};
    barrier.arrivals = barrier.pending = static_cast<int>(arrivals);
    barrier.initialised_by = machine::state.current;
    barrier.initialised = machine::now(machine::self());
    machine::self().initialised.push_back(&barrier);
}
inline void fence_mbarrier_init() {
    for (machine::Mbarrier* barrier : machine::self().initialised) barrier->fenced = true;
}
inline void mbarrier_arrive(uint32_t address) {
    machine::preempt();
    machine::arrive(machine::mbarrier_at(machine::own_cta(), address, false), machine::self());
}
inline void mbarrier_arrive_expect_tx(uint32_t address, uint32_t bytes) {
    machine::preempt();
    machine::arrive(machine::mbarrier_at(machine::own_cta(), address, false), machine::self(), bytes);
}
inline void mbarrier_arrive_cluster(uint32_t address, uint32_t rank) {
    machine::preempt();
    machine::Cta& cta = *machine::cta_of_cluster(rank);
    if (cta.running == 0) machine::fail("arrival on a barrier of a CTA that has ended");
    machine::arrive(machine::mbarrier_at(cta, address, &cta != &machine::own_cta()), machine::self());
}
inline bool mbarrier_try_wait(uint32_t address, uint32_t parity) {
    machine::Mbarrier& barrier = machine::mbarrier_at(machine::own_cta(), address, false);
    if (!machine::is_over(barrier, parity)) {
        machine::spin({"mbarrier_try_wait", address, parity, &barrier});
        if (!machine::is_over(barrier, parity)) return false;
    }
    machine::learn(barrier.completed);
    return true;
}
inline void mbarrier_wait(uint32_t address, uint32_t parity) {
    machine::preempt();
    machine::Mbarrier& barrier = machine::mbarrier_at(machine::own_cta(), address, false);
    while (!machine::is_over(barrier, parity))
        machine::block(barrier.waiters, {"mbarrier_wait", address, parity, &barrier});
    machine::learn(barrier.completed);
}

inline void named_barrier_sync(int id, int threads) { machine::named_barrier("named_barrier_sync", id, threads, true); }
inline void named_barrier_arrive(int id, int threads) {
    machine::named_barrier("named_barrier_arrive", id, threads, false);
}

inline void cluster_arrive() {
    machine::together("cluster_arrive", [](machine::Warp&) -> machine::Waiters* {
        machine::Cluster& cluster = *machine::own_cta().cluster;
        for (int lane = 0; lane < 32; ++lane) {
            machine::Fibre& fibre = machine::lane_of_own_warp(lane);
            if (fibre.cluster_arrived) machine::fail("cluster_arrive twice without cluster_wait");
            fibre.cluster_arrived = true;
            fibre.cluster_phase = cluster.barrier.phase;
            machine::release(fibre, cluster.barrier.arriving);
        }
        cluster.barrier.arrived += 32;
        machine::complete_if_done(cluster);
        return nullptr;
    });
}
inline void cluster_wait() {
    machine::together("cluster_wait", [](machine::Warp&) -> machine::Waiters* { return nullptr; });
    machine::ClusterBarrier& barrier = machine::own_cta().cluster->barrier;
    if (!machine::self().cluster_arrived) machine::fail("cluster_wait without cluster_arrive");
    machine::self().cluster_arrived = false;
    while (barrier.phase == machine::self().cluster_phase) machine::block(barrier.waiters, {"cluster_wait"});
    machine::learn(barrier.completed);
}
inline void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

// Who reads the same again is taken to poll.
inline uint32_t load_acquire(const uint32_t* flag) {
    machine::preempt();
    machine::Fibre& fibre = machine::self();
    if (fibre.polled == flag && fibre.polled_value == *flag) machine::spin({"a flag, which is", *flag});
    fibre.polled = flag;
    fibre.polled_value = *flag;
    machine::learn(machine::state.flags[flag]);
    return fibre.polled_value;
}
inline void add_release(uint32_t* flag, uint32_t value) {
    machine::preempt();
    machine::release(machine::self(), machine::state.flags[flag]);
    *flag += value;
    machine::wake(machine::state.spinning);
}
inline uint32_t fetch_add(uint32_t* flag, uint32_t value) {
    machine::preempt();
    const uint32_t before = *flag;
    *flag += value;
    machine::wake(machine::state.spinning);
    return before;
}
inline void back_off() {}

}  // namespace ewa::hopper
