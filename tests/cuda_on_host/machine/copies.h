// TMA and cp.async: what moves bytes while threads go on.
#pragma once

#include "barriers.h"
#include "tensor_maps.h"

namespace ewa::machine {

inline void complete(const Load& load) {
    Cta& cta = *load.to_cta;
    for_each_chunk(load.map, load.to, load.at, [&cta](uint32_t to, uint8_t* from, size_t first, size_t last) {
        uint8_t chunk[16] = {};
        if (last > first) read_global(chunk + first, from + first, last - first);
        write_shared_by_tma(cta, to - shared_begin, chunk, 16);
    });
    Mbarrier& barrier = cta.mbarriers[load.barrier];
    --cta.loads_in_flight;
    if (barrier.phase != load.phase)
        fail("TMA load completes in a later phase of mbarrier " + std::to_string(load.barrier) +
             " than it began in: expect_tx too small, or given to another phase");
    barrier.bytes -= load.map.box_bytes();
    complete_if_done(barrier);
}

inline void load(int rank, uint32_t to, const TensorMap* map, uint32_t barrier, std::array<int, 3> at, uint32_t mask) {
    preempt();
    check_dependent();
    check_tensor_map(*map, rank);
    for (uint32_t i = 0; mask >> i != 0; ++i) {
        if ((mask >> i & 1) == 0) continue;
        Cta& cta = *cta_of_cluster(i);
        if (cta.running == 0) fail("TMA load to a CTA that has ended");
        check_box_address(cta, *map, to);
        check_overwrite(self(), cta, to - shared_begin, static_cast<uint32_t>(map->box_bytes()));
        const Load next{&cta, to, barrier, mbarrier_at(cta, barrier, true).phase, *map, at};
        ++cta.loads_in_flight;
        if (state.options.tma == When::at_once)
            complete(next);
        else
            state.loads.push_back(next);
    }
    preempt();
}

inline void read(Store& store) {
    if (store.has_read) return;
    store.has_read = true;
    store.data.reserve(static_cast<size_t>(store.map.box_bytes()));
    for_each_chunk(store.map, store.from, store.at, [&store](uint32_t from, uint8_t*, size_t, size_t) {
        const uint8_t* chunk = &store.from_cta->async[from - shared_begin];
        store.data.insert(store.data.end(), chunk, chunk + 16);
    });
}

inline void complete(Store& store) {
    if (store.is_done) return;
    read(store);
    store.is_done = true;
    size_t chunk = 0;
    for_each_chunk(store.map, store.from, store.at, [&](uint32_t, uint8_t* to, size_t first, size_t last) {
        if (last > first) write_global_by_tma(to + first, &store.data[chunk + first], last - first);
        chunk += 16;
    });
}

inline void store(int rank, const TensorMap* map, uint32_t from, std::array<int, 3> at) {
    preempt();
    check_dependent();
    check_tensor_map(*map, rank);
    check_box_address(own_cta(), *map, from);
    begin_async_read(own_cta(), from - shared_begin, static_cast<uint32_t>(map->box_bytes()));
    self().open_stores.stores.push_back({&own_cta(), *map, from, at, false, false, {}});
    if (state.options.tma == When::at_once) complete(self().open_stores.stores.back());
}

// All groups but the last `left`: read them, or complete them. Others may also happen now.
inline void wait_for_stores(size_t left, bool only_read) {
    auto& groups = self().store_groups;
    for (size_t i = 0; i < groups.size(); ++i) {
        const bool waited = i + left < groups.size();
        const bool is_new = waited && !groups[i].waited_read;
        groups[i].waited_read |= waited;
        for (Store& store : groups[i].stores) {
            const auto bytes = static_cast<uint32_t>(store.map.box_bytes());
            if (is_new) end_async_read(own_cta(), store.from - shared_begin, bytes);
            if (waited || by_chance(state.options.tma)) read(store);
            if ((waited && !only_read) || (store.has_read && by_chance(state.options.tma))) complete(store);
        }
    }
    while (!only_read && groups.size() > left) groups.pop_front();
    preempt();
}

// The next of a thread's cp.async; they land in order.
inline void land_one(Fibre& fibre) {
    const Copy copy = fibre.copies.front();
    fibre.copies.pop_front();
    if (copy.kind == Copy::bytes) {
        uint8_t bytes[16] = {};
        memcpy(bytes, copy.from, copy.size);
        write_shared(fibre, copy.to, bytes, 16);
    } else if (copy.kind == Copy::arrive) {
        arrive(fibre.cta->mbarriers[copy.to], fibre);
    }
    if (fibre.copies.empty())
        state.copying.erase(std::find(state.copying.begin(), state.copying.end(), &fibre));
}

inline void copy(Copy next) {
    if (self().copies.empty()) state.copying.push_back(state.current);
    self().copies.push_back(next);
    if (state.options.cp_async == When::at_once) land_one(self());
}

inline void wait_for_copies(int left) {
    const auto is_commit = [](const Copy& c) { return c.kind == Copy::commit; };
    auto& copies = self().copies;
    auto groups = std::count_if(copies.begin(), copies.end(), is_commit);
    while (groups > left) {
        groups -= is_commit(copies.front());
        land_one(self());
    }
    preempt();
}

inline void check_copy(uint32_t to, const void* from, uint32_t bytes) {
    check_dependent();
    shared_index(own_cta(), to, 16, 16);
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("cp.async: misaligned address in global memory");
    if (bytes > 16) fail("cp.async: more than 16 bytes");
}

}  // namespace ewa::machine

namespace ewa::hopper {

inline void prefetch_tensor_map(const TensorMap*) {}

inline void tma_load_2d(uint32_t to, const TensorMap* map, uint32_t barrier, int x, int y) {
    machine::load(2, to, map, barrier, {x, y, 0}, 1u << cluster_rank());
}
inline void tma_load_3d(uint32_t to, const TensorMap* map, uint32_t barrier, int x, int y, int z) {
    machine::load(3, to, map, barrier, {x, y, z}, 1u << cluster_rank());
}
inline void tma_load_multicast_2d(uint32_t to, const TensorMap* map, uint32_t barrier, int x, int y, uint16_t mask) {
    machine::load(2, to, map, barrier, {x, y, 0}, mask);
}
inline void tma_load_multicast_3d(uint32_t to, const TensorMap* map, uint32_t barrier, int x, int y, int z,
                                  uint16_t mask) {
    machine::load(3, to, map, barrier, {x, y, z}, mask);
}

inline void tma_store_2d(const TensorMap* map, uint32_t from, int x, int y) { machine::store(2, map, from, {x, y, 0}); }
inline void tma_store_3d(const TensorMap* map, uint32_t from, int x, int y, int z) {
    machine::store(3, map, from, {x, y, z});
}
inline void tma_store_commit() {
    machine::Fibre& fibre = machine::self();
    fibre.store_groups.push_back(std::move(fibre.open_stores));
    fibre.open_stores = {};
}
template <int kGroups>
void tma_store_wait_read() {
    machine::wait_for_stores(kGroups, true);
}
template <int kGroups>
void tma_store_wait() {
    machine::wait_for_stores(kGroups, false);
}

inline void cp_async_16(uint32_t to, const void* from, uint32_t bytes) {
    machine::check_copy(to, from, bytes);
    machine::copy({machine::Copy::bytes, to, from, bytes});
}
inline void cp_async_16(uint32_t to, const void* from) { cp_async_16(to, from, 16); }
inline void cp_async_commit() { machine::copy({machine::Copy::commit, 0, nullptr, 0}); }
template <int kGroups>
void cp_async_wait() {
    machine::wait_for_copies(kGroups);
}
inline void cp_async_mbarrier_arrive(uint32_t barrier) {
    machine::mbarrier_at(machine::own_cta(), barrier, false);
    machine::copy({machine::Copy::arrive, barrier, nullptr, 0});
    machine::preempt();
}

}  // namespace ewa::hopper
