// Shared and global memory, as threads (the generic proxy) and as TMA and wgmma (the async proxy) see it.
#pragma once

#include <cstring>

#include "fibres.h"

namespace ewa::machine {

// Dynamic shared memory starts where it is aligned to no more than 16 bytes.
constexpr uint32_t shared_begin = 1040;
constexpr int max_shared_bytes = 232448;

inline uint32_t shared_index(const Cta& cta, uint32_t address, uint32_t bytes, uint32_t alignment) {
    if (address % alignment != 0) {
        fail("misaligned address in shared memory: " + std::to_string(address));
        return 0;
    }
    if (address < shared_begin || address - shared_begin + bytes > cta.generic.size()) {
        fail("address outside shared memory: " + std::to_string(address));
        return 0;
    }
    return address - shared_begin;
}

// A thread reads or writes global memory, itself or by TMA.
inline void check_dependent() {
    if (state.options.dependent && !self().has_waited_for_grids)
        fail("global memory is used before griddepcontrol_wait");
}

inline Stamp now(const Fibre& fibre) { return fibre.cta->warps[fibre.thread / 32].now; }

inline bool knows(const Fibre& fibre, Stamp stamp) { return fibre.knows.at(stamp.warp) >= stamp.epoch; }

// A thread arrives, and hands on to those who will wait there; `learn` is for these.
inline void release(Fibre& fibre, Clock& to) {
    to.learn(fibre.knows);
    to.learn(fibre.cta->warps[fibre.thread / 32].now);
    ++fibre.cta->warps[fibre.thread / 32].now.epoch;
}
inline void learn(const Clock& from) { self().knows.learn(from); }

// Before `writer`, or TMA for it, writes to shared memory: it must know of all that others did there.
inline void check_overwrite(const Fibre& writer, const Cta& cta, uint32_t begin, uint32_t bytes) {
    const auto others = [&writer](Stamp stamp) {
        return stamp.epoch != 0 && stamp.warp != now(writer).warp && !knows(writer, stamp);
    };
    for (uint32_t i = begin / 4; i < (begin + bytes) / 4; ++i) {
        if (cta.async_reads[i] > 0)
            return fail("race: writes in shared memory what a TMA store or wgmma may still read");
        if (others(cta.writers[i])) return fail("race: writes in shared memory over what another warp wrote");
        for (uint32_t left = cta.readers[i]; left != 0; left &= left - 1) {
            const auto warp = static_cast<uint32_t>(__builtin_ctz(left));
            if (others({cta.warps[warp].now.warp, cta.read_epochs[i * cta.warps.size() + warp]}))
                return fail("race: writes in shared memory what another warp may still read");
        }
    }
}

inline void write_shared(Fibre& writer, uint32_t address, const void* from, uint32_t bytes) {
    Cta& cta = *writer.cta;
    const uint32_t begin = shared_index(cta, address, bytes, bytes);
    const Stamp stamp = now(writer);
    check_overwrite(writer, cta, begin, bytes);
    memcpy(&cta.generic[begin], from, bytes);
    for (uint32_t i = begin / 4; i < (begin + bytes) / 4; ++i) cta.writers[i] = stamp, cta.readers[i] = 0;
    writer.written.push_back({begin, bytes, stamp});
}

inline void check_race(Stamp writer, const char* where) {
    if (writer.epoch != 0 && writer.warp != now(self()).warp && !knows(self(), writer))
        fail(std::string("race: reads ") + where + " what another warp wrote, without a barrier between");
}

inline void note_read(uint32_t begin, uint32_t bytes) {
    Cta& cta = own_cta();
    const auto warp = static_cast<size_t>(self().thread / 32);
    for (uint32_t i = begin / 4; i < (begin + bytes) / 4; ++i) {
        cta.readers[i] |= 1u << warp;
        cta.read_epochs[i * cta.warps.size() + warp] = cta.warps[warp].now.epoch;
    }
}

// TMA or wgmma reads from here on, until a thread has waited for it: whoever knows of that may write there again.
inline void begin_async_read(Cta& cta, uint32_t begin, uint32_t bytes) {
    for (uint32_t i = begin / 4; i < (begin + bytes) / 4; ++i) ++cta.async_reads[i];
}
inline void end_async_read(Cta& cta, uint32_t begin, uint32_t bytes) {
    for (uint32_t i = begin / 4; i < (begin + bytes) / 4; ++i) --cta.async_reads[i];
    note_read(begin, bytes);
}

inline void read_shared(void* to, uint32_t address, uint32_t bytes) {
    Cta& cta = own_cta();
    const uint32_t begin = shared_index(cta, address, bytes, bytes);
    for (uint32_t i = begin / 4; i < (begin + bytes) / 4; ++i) check_race(cta.writers[i], "in shared memory");
    note_read(begin, bytes);
    memcpy(to, &cta.generic[begin], bytes);
}

template <class T>
T read_shared(uint32_t address) {
    T value;
    read_shared(&value, address, sizeof(T));
    return value;
}

// As TMA writes.
inline void write_shared_by_tma(Cta& cta, uint32_t begin, const void* from, uint32_t bytes) {
    memcpy(&cta.generic[begin], from, bytes);
    memcpy(&cta.async[begin], from, bytes);
    for (uint32_t i = begin / 4; i < (begin + bytes) / 4; ++i) cta.writers[i] = {}, cta.readers[i] = 0;
}

// What threads write to global memory is there at once, but TMA still reads what was there before.
inline void write_global(void* to, const void* from, size_t bytes) {
    check_dependent();
    const auto begin = reinterpret_cast<uintptr_t>(to);
    if (begin % bytes != 0) fail("misaligned store to global memory");
    Stale& stale = state.stale[begin / 16];
    for (size_t i = 0; i < bytes; ++i) {
        const size_t byte = begin % 16 + i;
        if (stale.mask >> byte & 1) continue;
        stale.bytes[byte] = static_cast<uint8_t*>(to)[i];
        stale.mask |= 1u << byte;
    }
    memcpy(to, from, bytes);
    for (size_t i = 0; i < bytes; i += 4) state.global_writers[(begin + i) / 4] = now(self());
    self().written_global.push_back({begin, bytes, now(self())});
}

inline void make_current(uintptr_t begin, size_t bytes) {
    if (state.stale.empty()) return;
    for (uintptr_t byte = begin; byte < begin + bytes; ++byte) {
        const auto found = state.stale.find(byte / 16);
        if (found == state.stale.end()) continue;
        found->second.mask &= ~(1u << byte % 16);
        if (found->second.mask == 0) state.stale.erase(found);
    }
}

// As TMA reads.
inline void read_global(void* to, const uint8_t* from, size_t bytes) {
    memcpy(to, from, bytes);
    if (state.stale.empty()) return;
    for (size_t i = 0; i < bytes; ++i) {
        const auto byte = reinterpret_cast<uintptr_t>(from) + i;
        const auto found = state.stale.find(byte / 16);
        if (found != state.stale.end() && found->second.mask >> byte % 16 & 1)
            static_cast<uint8_t*>(to)[i] = found->second.bytes[byte % 16];
    }
}

// As TMA writes, when it has completed.
inline void write_global_by_tma(uint8_t* to, const void* from, size_t bytes) {
    memcpy(to, from, bytes);
    make_current(reinterpret_cast<uintptr_t>(to), bytes);
    for (size_t i = 0; i < bytes && !state.global_writers.empty(); i += 4)
        state.global_writers.erase((reinterpret_cast<uintptr_t>(to) + i) / 4);
}

template <class T>
T read_constant(const void* at) {
    check_dependent();
    T value;
    memcpy(&value, at, sizeof value);
    return value;
}

// A fence shows what its thread wrote and what it knows that others wrote; what it does not know stays hidden.
template <class Ranges, class Show>
void show_known(const Fibre* writer, Ranges& ranges, Show&& show) {
    const auto is_known = [&](const auto& r) { return writer == state.current || knows(self(), r.stamp); };
    size_t kept = 0;
    for (const auto& r : ranges)
        if (is_known(r))
            show(r);
        else
            ranges[kept++] = r;
    ranges.resize(kept);
}

inline void fence_shared() {
    Cta& cta = own_cta();
    const auto show = [&cta](const Range& r) { memcpy(&cta.async[r.begin], &cta.generic[r.begin], r.bytes); };
    for (Fibre* writer : cta.fibres)
        if (!writer->written.empty()) show_known(writer, writer->written, show);
}

inline void fence_global() {
    const auto show = [](const GlobalRange& r) { make_current(r.begin, r.bytes); };
    show_known(nullptr, state.written_global, show);
    for (auto& cluster : state.clusters)
        for (auto& cta : cluster->ctas)
            for (Fibre* writer : cta->fibres) show_known(writer, writer->written_global, show);
}

}  // namespace ewa::machine

namespace ewa::hopper {

inline int thread_id() { return machine::self().thread; }
inline uint32_t cluster_rank() { return static_cast<uint32_t>(machine::own_cta().rank); }
inline uint32_t cluster_id() { return static_cast<uint32_t>(machine::own_cta().cluster->id); }
inline uint32_t num_clusters() { return static_cast<uint32_t>(machine::state.grid.clusters); }
inline uint32_t shared_memory() { return (machine::shared_begin + 1023u) & ~1023u; }

inline void fence_proxy_async_shared() {
    machine::fence_shared();
    for (machine::Mbarrier* barrier : machine::self().initialised) barrier->fenced = true;
}
inline void fence_proxy_async_global() { machine::fence_global(); }
inline void fence_gpu() {}
inline void griddepcontrol_wait() { machine::self().has_waited_for_grids = true; }
inline void griddepcontrol_launch_dependents() {}

inline uint32_t load_shared_u32(uint32_t at) { return machine::read_shared<uint32_t>(at); }
inline float load_shared_f32(uint32_t at) { return machine::read_shared<float>(at); }
inline float2 load_shared_f32x2(uint32_t at) { return machine::read_shared<float2>(at); }
inline uint4 load_shared_u32x4(uint32_t at) { return machine::read_shared<uint4>(at); }
inline void store_shared_u32(uint32_t at, uint32_t v) { machine::write_shared(machine::self(), at, &v, 4); }
inline void store_shared_f32(uint32_t at, float v) { machine::write_shared(machine::self(), at, &v, 4); }
inline void store_shared_f32x2(uint32_t at, float2 v) { machine::write_shared(machine::self(), at, &v, 8); }
inline void store_shared_u32x4(uint32_t at, uint4 v) { machine::write_shared(machine::self(), at, &v, 16); }

inline uint64_t load_constant_u64(const void* at) { return machine::read_constant<uint64_t>(at); }
inline float load_constant_f32(const float* at) { return machine::read_constant<float>(at); }
inline uint32_t load_constant_u16(const uint16_t* at) { return machine::read_constant<uint16_t>(at); }
template <class T>
T load_global(const void* at) {
    machine::check_dependent();
    const auto address = reinterpret_cast<uintptr_t>(at);
    if (address % sizeof(T) != 0) machine::fail("misaligned load from global memory");
    for (size_t i = 0; i < sizeof(T); i += 4) {
        const auto writer = machine::state.global_writers.find((address + i) / 4);
        if (writer != machine::state.global_writers.end()) machine::check_race(writer->second, "in global memory");
    }
    T v;
    memcpy(&v, at, sizeof v);
    return v;
}
inline void load_global_f32x4(const float* at, float (&v)[4]) {
    const uint4 bits = load_global<uint4>(at);
    memcpy(v, &bits, 16);
}
inline uint4 load_global_u32x4(const void* at) { return load_global<uint4>(at); }
inline int load_global_i32(const int* at) { return load_global<int>(at); }
inline void store_global_i32(int* at, int v) { machine::write_global(at, &v, 4); }
inline void store_global_u32(uint32_t* at, uint32_t v) { machine::write_global(at, &v, 4); }
inline void store_global_f32(float* at, float v) { machine::write_global(at, &v, 4); }
inline void store_global_u32x4(void* at, uint4 v) { machine::write_global(at, &v, 16); }

}  // namespace ewa::hopper
