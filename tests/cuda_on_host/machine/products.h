// wgmma: each warp computes its 16 of 64 rows, from what shared memory holds when that happens.
#pragma once

#include "warps.h"

namespace ewa::machine {

// What a thread finds in an accumulator that is in flight: a NaN, and one that shows if someone has written it.
constexpr uint32_t in_flight_bits = 0x7FC5EA7Eu;

using Eight = float __attribute__((vector_size(32), aligned(4)));

inline float operand(uint16_t bits, Operand type) {
    return type == Operand::bf16 ? widen(BFloat16{bits}) : widen(Half{bits});
}

// Of 16 bytes where the descriptor says: for K-major 8 k of one row, for MN-major 8 rows of one k.
inline uint32_t chunk_at(const Cta& cta, uint64_t descriptor, Major major, int mn, int k) {
    const auto field = [descriptor](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3FFF) << 4; };
    const uint32_t start = field(0), leading = field(16), stride = field(32);
    const auto u = [](int v) { return static_cast<uint32_t>(v); };
    const uint32_t address = major == Major::k
                                 ? start + u(mn / 8) * stride + u(mn % 8) * 128 + u(k) * 2
                                 : start + u(mn / 64) * leading + u(k / 8) * stride + u(k % 8) * 128 + u(mn % 64) * 2;
    return shared_index(cta, address ^ (address >> 7 & 7) << 4, 16, 16);
}

template <class Act>
void for_each_operand_chunk(const Cta& cta, uint64_t descriptor, Major major, int first, int count, Act&& act) {
    for (int mn = 0; mn < count; mn += major == Major::k ? 1 : 8)
        for (int k = 0; k < 16; k += major == Major::k ? 8 : 1)
            act(chunk_at(cta, descriptor, major, first + mn, k), mn, k);
}

// to[k][mn], for mn from `first` on.
inline void decode(const Cta& cta, uint64_t descriptor, Major major, Operand type, int first, int count, float* to,
                   int width) {
    for_each_operand_chunk(cta, descriptor, major, first, count, [&](uint32_t at, int mn, int k) {
        uint16_t chunk[8];
        memcpy(chunk, &cta.async[at], 16);
        for (int i = 0; i < 8; ++i) {
            const int column = major == Major::k ? mn : mn + i, row = major == Major::k ? k + i : k;
            to[row * width + column] = operand(chunk[i], type);
        }
    });
}

// The row and column of accumulator i of a lane, in the warp's 16 rows.
inline int row_of(int lane, int i) { return lane / 4 + (i >> 1 & 1) * 8; }
inline int column_of(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + (i & 1); }

inline void show(Warp& warp, Accumulators* done) {
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < done->registers; ++i) {
            float& seen = done->seen[lane][i];
            if (bit_cast<uint32_t>(seen) != in_flight_bits) fail("accumulators were written while wgmma was in flight");
            seen = done->values[static_cast<size_t>(lane * done->registers + i)];
        }
    auto& all = warp.accumulators_in_flight;
    all.erase(std::find_if(all.begin(), all.end(), [done](const auto& a) { return a.get() == done; }));
}

inline void execute_one(Cta& cta, int warp_number) {
    static float a[16 * 16], b[16 * 256];
    Warp& warp = cta.warps[static_cast<size_t>(warp_number)];
    const Product product = warp.products.front();
    warp.products.pop_front();
    const Shape& shape = product.shape;
    decode(cta, shape.a, shape.major_a, shape.type, warp_number % 4 * 16, 16, a, 16);
    decode(cta, shape.b, shape.major_b, shape.type, 0, shape.n, b, shape.n);
    Eight sums[16][32] = {};
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k)
            for (int j = 0; j < shape.n / 8; ++j)
                sums[row][j] += a[k * 16 + row] * *reinterpret_cast<const Eight*>(&b[k * shape.n + j * 8]);
    Accumulators& to = *product.to;
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < to.registers; ++i) {
            const int column = column_of(lane, i);
            float& value = to.values[static_cast<size_t>(lane * to.registers + i)];
            value = sums[row_of(lane, i)][column / 8][column % 8] + (shape.accumulate ? value : 0.0f);
        }
    if (--to.in_flight == 0) show(warp, &to);
}

inline Accumulators* put_in_flight(Warp& warp, const Shape& shape) {
    for (auto& accumulators : warp.accumulators_in_flight)
        if (accumulators->seen[0] == warp.accumulators[0]) {
            if (accumulators->registers != shape.n / 2) fail("wgmma: accumulators are in flight in another shape");
            return accumulators.get();
        }
    if (!warp.fenced) fail("wgmma without wgmma_fence since accumulators could be used");
    warp.accumulators_in_flight.push_back(std::make_unique<Accumulators>());
    Accumulators& added = *warp.accumulators_in_flight.back();
    added.registers = shape.n / 2;
    int registers = 0;
    for (const auto& accumulators : warp.accumulators_in_flight) registers += accumulators->registers;
    if (registers > warp.registers) fail("wgmma: more accumulators than the thread has registers");
    added.values.resize(static_cast<size_t>(32 * added.registers));
    for (int lane = 0; lane < 32; ++lane) {
        added.seen[lane] = warp.accumulators[lane];
        for (int i = 0; i < added.registers; ++i) {
            float& seen = added.seen[lane][i];
            if (shape.accumulate) added.values[static_cast<size_t>(lane * added.registers + i)] = seen;
            seen = bit_cast<float>(in_flight_bits);
        }
    }
    return &added;
}

inline void check_descriptor(uint64_t descriptor) {
    if (descriptor >> 62 != 1) fail("descriptor: another layout than the swizzle of 128 bytes");
    if ((descriptor >> 49 & 7) != 0) fail("descriptor: a base offset");
}

inline void begin_operand_reads(Cta& cta, int warp_number, const Shape& shape) {
    Warp& warp = cta.warps[static_cast<size_t>(warp_number)];
    OperandReads reads{warp.group, {}};
    const auto begin = [&](uint32_t chunk, int, int) {
        begin_async_read(cta, chunk, 16);
        reads.chunks.push_back(chunk);
    };
    for_each_operand_chunk(cta, shape.a, shape.major_a, warp_number % 4 * 16, 16, begin);
    for_each_operand_chunk(cta, shape.b, shape.major_b, 0, shape.n, begin);
    warp.operand_reads.push_back(std::move(reads));
}

inline void issue(const Shape& shape, float* accumulators) {
    Warp& own = own_warp();
    const int lane = self().lane();
    own.accumulators[lane] = accumulators;
    const uint64_t words[2] = {shape.a, shape.b};
    memcpy(own.in[lane], words, sizeof(words));
    own.in[lane][4] = shape.accumulate;
    together("wgmma", [shape](Warp& warp) -> Waiters* {
        for (const auto& in : warp.in)
            if (memcmp(in, warp.in[0], sizeof(in)) != 0) fail("wgmma differs between lanes of a warp");
        const int warp_number = self().thread / 32;
        if ((warp_number | 3) >= state.grid.threads / 32) fail("wgmma in a warpgroup that is not whole");
        check_descriptor(shape.a);
        check_descriptor(shape.b);
        repeat(own_cta().warpgroups[static_cast<size_t>(warp_number / 4)].shapes, warp.shapes, shape, "wgmma");
        Accumulators* to = put_in_flight(warp, shape);
        ++to->in_flight;
        warp.products.push_back({shape, warp.group, to});
        begin_operand_reads(own_cta(), warp_number, shape);
        if (state.options.wgmma == When::at_once) execute_one(own_cta(), warp_number);
        return nullptr;
    });
}

// Groups that were committed, but the last `left`.
inline void wait_for_products(uint64_t left) {
    together("wgmma_wait", [left](Warp& warp) -> Waiters* {
        const auto is_over = [&](const auto& list) { return !list.empty() && list.front().group + left < warp.group; };
        while (is_over(warp.products)) execute_one(own_cta(), self().thread / 32);
        for (; is_over(warp.operand_reads); warp.operand_reads.pop_front())
            for (const uint32_t chunk : warp.operand_reads.front().chunks) end_async_read(own_cta(), chunk, 16);
        warp.fenced = false;
        return nullptr;
    });
    preempt();
}

}  // namespace ewa::machine

namespace ewa::hopper {

inline void wgmma_fence() {
    machine::together("wgmma_fence", [](machine::Warp& warp) -> machine::Waiters* {
        warp.fenced = true;
        return nullptr;
    });
}
inline void wgmma_commit() {
    machine::together("wgmma_commit", [](machine::Warp& warp) -> machine::Waiters* {
        ++warp.group;
        return nullptr;
    });
}
template <int kGroups>
void wgmma_wait() {
    machine::wait_for_products(kGroups);
}
template <int kRegisters>
void pin(float (&)[kRegisters]) {}

template <int kN, Operand kType, Major kMajorA, Major kMajorB>
void wgmma(float (&d)[kN / 2], uint64_t descriptor_a, uint64_t descriptor_b, bool accumulate) {
    static_assert(kN == 8 || kN == 64 || kN == 96 || kN == 128 || kN == 192 || kN == 256);
    machine::issue({kN, kType, kMajorA, kMajorB, descriptor_a, descriptor_b, accumulate}, d);
}

}  // namespace ewa::hopper
