// What the lanes of a warp do together, arithmetic, and the pool of registers.
#pragma once

#include <cstring>

#include "elements.h"
#include "memory.h"

namespace ewa::machine {

// The last lane to come acts for all, and all go on; or, if it returns waiters, all wait there.
template <class Act>
void together(const char* instruction, Act&& act, Reason reason = {}) {
    Warp& warp = own_warp();
    if (warp.arrived > 0 && strcmp(warp.instruction, instruction) != 0)
        fail(std::string("diverged: lanes of a warp are in ") + warp.instruction + " and in " + instruction);
    if (warp.ended > 0) fail(std::string("diverged: ") + instruction + ", but lanes of the warp have ended");
    warp.instruction = instruction;
    if (reason.what[0] == '\0') reason.what = instruction;
    if (++warp.arrived < 32) return block(warp.waiters, reason);
    warp.arrived = 0;
    Waiters others;
    others.swap(warp.waiters);
    Waiters* waiters = act(warp);
    if (waiters == nullptr) return make_ready(others);
    waiters->insert(waiters->end(), others.begin(), others.end());
    block(*waiters, reason);
}

inline Fibre& lane_of_own_warp(int lane) { return *own_cta().fibres[self().thread / 32 * 32 + lane]; }

template <class Source>
uint32_t exchange(const char* instruction, uint32_t value, Source&& source) {
    const int lane = self().lane();
    own_warp().in[lane][0] = value;
    own_warp().in[lane][1] = static_cast<uint32_t>(source(lane));
    together(instruction, [](Warp& warp) -> Waiters* {
        for (int i = 0; i < 32; ++i) warp.out[i][0] = warp.in[warp.in[i][1] % 32][0];
        return nullptr;
    });
    return own_warp().out[lane][0];
}

// Requests are granted in their order.
inline void grant_registers(Cta& cta) {
    while (!cta.register_requests.empty()) {
        RegisterRequest& request = cta.register_requests.front();
        const int more = request.registers - request.warp->registers;
        if (more > cta.free_registers) return;
        cta.free_registers -= more;
        request.warp->registers = request.registers;
        wake(request.waiters);
        cta.register_requests.pop_front();
    }
}

// All warps of a warpgroup must say the same, one after the other.
template <class T>
void repeat(std::vector<T>& said, size_t& how_far, const T& next, const char* what) {
    if (how_far == said.size()) said.push_back(next);
    if (!(said[how_far++] == next)) fail(std::string("warps of a warpgroup differ in ") + what);
}

inline void set_registers(int registers, bool more) {
    if (registers < 24 || registers > 256 || registers % 8 != 0) fail("setmaxnreg: number of registers");
    const auto act = [registers, more](Warp& warp) -> Waiters* {
        Cta& cta = own_cta();
        repeat(cta.warpgroups[self().thread / 128].changes, warp.changes, registers, "setmaxnreg");
        if (more ? registers < warp.registers : registers > warp.registers)
            fail("setmaxnreg from " + std::to_string(warp.registers) + " to " + std::to_string(registers));
        if (!more) {
            cta.free_registers += warp.registers - registers;
            warp.registers = registers;
            grant_registers(cta);
            return nullptr;
        }
        cta.register_requests.push_back({&warp, registers, {}});
        grant_registers(cta);
        return warp.registers == registers ? nullptr : &cta.register_requests.back().waiters;
    };
    together("setmaxnreg", act, {"setmaxnreg: registers", registers});
}

// Reads or writes rows of 16 bytes: a row's address comes from its lane, its elements are in four lanes.
inline void write_matrices(Warp& warp) {
    for (int matrix = 0; matrix < 4; ++matrix)
        for (int row = 0; row < 8; ++row) {
            uint32_t words[4];
            for (int i = 0; i < 4; ++i) words[i] = warp.in[row * 4 + i][matrix + 1];
            const int lane = matrix * 8 + row;
            write_shared(lane_of_own_warp(lane), warp.in[lane][0], words, 16);
        }
}

inline void read_matrices(Warp& warp, bool transposed) {
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t elements[8][8];
        for (int row = 0; row < 8; ++row) read_shared(elements[row], warp.in[matrix * 8 + row][0], 16);
        for (int lane = 0; lane < 32; ++lane) {
            const int i = lane / 4, j = lane % 4 * 2;
            const uint32_t low = transposed ? elements[j][i] : elements[i][j];
            const uint32_t high = transposed ? elements[j + 1][i] : elements[i][j + 1];
            warp.out[lane][matrix] = low | high << 16;
        }
    }
}

inline void load_matrices(const char* instruction, uint32_t row, uint32_t (&r)[4], bool transposed) {
    const int lane = self().lane();
    own_warp().in[lane][0] = row;
    together(instruction, [transposed](Warp& warp) -> Waiters* {
        read_matrices(warp, transposed);
        return nullptr;
    });
    memcpy(r, own_warp().out[lane], 16);
}

}  // namespace ewa::machine

namespace ewa::hopper {

template <class T>
T shuffle(T value, int lane) {
    return bit_cast<T>(machine::exchange("shuffle", bit_cast<uint32_t>(value), [lane](int) { return lane; }));
}
template <class T>
T shuffle_xor(T value, int mask) {
    const auto other = [mask](int lane) { return lane ^ mask; };
    return bit_cast<T>(machine::exchange("shuffle_xor", bit_cast<uint32_t>(value), other));
}
inline int warp_uniform(int value) {
    return static_cast<int>(machine::exchange("warp_uniform", static_cast<uint32_t>(value), [](int) { return 0; }));
}
inline bool elect_one() {
    machine::together("elect_one", [](machine::Warp&) -> machine::Waiters* { return nullptr; });
    return machine::self().lane() == machine::state.elected;
}
inline void warp_sync() {
    machine::together("warp_sync", [](machine::Warp&) -> machine::Waiters* {
        machine::Clock all;
        for (int lane = 0; lane < 32; ++lane) machine::release(machine::lane_of_own_warp(lane), all);
        for (int lane = 0; lane < 32; ++lane) machine::lane_of_own_warp(lane).knows.learn(all);
        return nullptr;
    });
}

template <int kRegisters>
void setmaxnreg_inc() {
    machine::set_registers(kRegisters, true);
}
template <int kRegisters>
void setmaxnreg_dec() {
    machine::set_registers(kRegisters, false);
}

inline void stmatrix_x4(uint32_t row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    const uint32_t in[5] = {row, r0, r1, r2, r3};
    memcpy(machine::own_warp().in[machine::self().lane()], in, sizeof(in));
    machine::together("stmatrix", [](machine::Warp& warp) -> machine::Waiters* {
        machine::write_matrices(warp);
        return nullptr;
    });
}
inline void ldmatrix_x4(uint32_t row, uint32_t (&r)[4]) { machine::load_matrices("ldmatrix", row, r, false); }
inline void ldmatrix_x4_transposed(uint32_t row, uint32_t (&r)[4]) {
    machine::load_matrices("ldmatrix.trans", row, r, true);
}

inline float exp2_approx(float x) { return std::exp2(x) < 1.17549435e-38f ? 0.0f : std::exp2(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
inline float max_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::max(a, b); }
inline uint32_t multiply_high(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}
template <Operand kType>
uint32_t pack(float low, float high) {
    if constexpr (kType == Operand::bf16)
        return nearest<BFloat16>(low).bits | static_cast<uint32_t>(nearest<BFloat16>(high).bits) << 16;
    return nearest<Half>(low).bits | static_cast<uint32_t>(nearest<Half>(high).bits) << 16;
}
template <Operand kType>
float2 unpack(uint32_t pair) {
    const auto low = static_cast<uint16_t>(pair), high = static_cast<uint16_t>(pair >> 16);
    if constexpr (kType == Operand::bf16) return {widen(BFloat16{low}), widen(BFloat16{high})};
    return {widen(Half{low}), widen(Half{high})};
}

}  // namespace ewa::hopper
