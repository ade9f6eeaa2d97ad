// Lanes, matrices, numbers, registers.
#include "programs.h"

namespace programs {
namespace {

std::string lanes(const Options& options) {
    std::vector<float> sums(64, 0.0f), elected(64, 0.0f), first(64, 0.0f);
    std::string said = launch({1, 1, 64, 4096}, options, [&] {
        const int t = thread_id();
        float sum = static_cast<float>(t);
        for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        sums[t] = sum + shuffle(static_cast<float>(t), (t + 5) % 32);
        first[t] = static_cast<float>(warp_uniform(t));
        for (int i = 0; i < 3; ++i)
            if (elect_one()) elected[warp_id()] += i == 0 ? t % 32 + 1 : t % 32 + 101;
    });
    said = compare(said, first, [](int t) { return t / 32 * 32; });
    said = compare(said, sums, [](int t) { return t / 32 * 1024 + 496 + t / 32 * 32 + (t + 5) % 32; });
    const int lane = static_cast<int>(elected[0] - 201) / 3;  // the same one all three times
    if (said.empty() && (lane < 0 || lane > 31)) said = "values: lane " + std::to_string(lane);
    return compare(said, elected, [lane](int warp) { return warp < 2 ? 3 * lane + 203 : 0; });
}

template <bool kMismatch>
std::string diverged(const Options& options) {
    return launch({1, 1, 32, 4096}, options, [&] {
        if (lane_id() < 16 && kMismatch)
            named_barrier_sync(1, 32);
        else if (lane_id() < 16)
            warp_uniform(0);
        if (lane_id() >= 16 && kMismatch) warp_uniform(0);
    });
}

uint32_t pair(int row, int column) { return static_cast<uint32_t>(row * 64 + column) | (row * 64 + column + 1) << 16; }

// A tile of 16 × 16 is stored, and read as it is and transposed.
std::string matrices(const Options& options) {
    std::vector<uint32_t> straight(128), transposed(128);
    std::string said = launch({1, 1, 32, 4096}, options, [&] {
        const int l = lane_id(), row = l / 4, column = l % 4 * 2;
        // Matrices in the order of wgmma's accumulators: rows 0 and 8 of columns 0, then of columns 8.
        const uint32_t at = shared_memory() + swizzled_offset(l & 15, l >> 4);
        stmatrix_x4(at, pair(row, column), pair(row + 8, column), pair(row, column + 8), pair(row + 8, column + 8));
        warp_sync();
        uint32_t r[4], t[4];
        ldmatrix_x4(at, r);
        ldmatrix_x4_transposed(at, t);
        for (int i = 0; i < 4; ++i) straight[l * 4 + i] = r[i], transposed[l * 4 + i] = t[i];
        if (load_shared_u32(shared_memory() + swizzled_offset(9, 1) + 4) != pair(9, 10)) straight[0] = ~0u;
    });
    said = compare(said, straight, [](int i) { return pair(i / 16 + i % 2 * 8, i / 4 % 4 * 2 + i % 4 / 2 * 8); });
    return compare(said, transposed, [](int i) {
        const int row = i / 4 % 4 * 2 + i % 2 * 8, column = i / 16 + i % 4 / 2 * 8;
        return static_cast<uint32_t>(row * 64 + column) | ((row + 1) * 64 + column) << 16;
    });
}

std::string numbers(const Options& options) {
    std::vector<float> values(10);
    const std::string said = launch({1, 1, 32, 4096}, options, [&] {
        if (thread_id() != 0) return;
        const float2 b = unpack<Operand::bf16>(pack<Operand::bf16>(1.00390625f, -3.0f));
        const float2 h = unpack<Operand::f16>(pack<Operand::f16>(1.00390625f, 1e6f));
        store_shared_f32(shared_memory() + 8, 5.0f);
        store_shared_f32(shared_memory() + 12, 6.0f);
        const float2 s = load_shared_f32x2(shared_memory() + 8);
        values = {s.x, s.y, b.x, b.y, h.x, h.y, exp2_approx(3.0f), exp2_approx(-130.0f),
                  static_cast<float>(multiply_high(1u << 31, 6)), static_cast<float>(pack<Operand::bf16>(1.0f, 0.0f))};
    });
    const float right[] = {5.0f, 6.0f, 1.0f, -3.0f, 1.00390625f, INFINITY, 8.0f, 0.0f, 3.0f, 16256.0f};
    return compare(said, values, [&right](int i) { return right[i]; });
}

template <int kOffset, bool kMatrix>
std::string bad_address(const Options& options) {
    return launch({1, 1, 32, 4096}, options, [&] {
        if (kMatrix)
            stmatrix_x4(shared_memory() + kOffset, 0, 0, 0, 0);
        else
            store_shared_u32(shared_memory() + kOffset, 0);
    });
}

std::string too_much_shared_memory(const Options& options) {
    return launch({1, 1, 32, 232464}, options, [] {});
}

// 384 threads start with 168 registers each: a producer warpgroup gives some to two others.
template <int kProducer, int kConsumer, int kWarps>
std::string registers(const Options& options) {
    return launch({1, 1, 384, 4096}, options, [&] {
        if (warp_id() >= 8 + kWarps) return;
        if (warp_id() >= 8)
            setmaxnreg_dec<kProducer>();
        else
            setmaxnreg_inc<kConsumer>();
    });
}

}  // namespace

const std::vector<Program> warp_programs = {
    {"lanes", lanes},
    {"lanes: some end", diverged<false>},
    {"lanes: two instructions", diverged<true>},
    {"matrices", matrices},
    {"matrices: misaligned", bad_address<8, true>},
    {"shared memory: outside", bad_address<4096, false>},
    {"shared memory: too much", too_much_shared_memory},
    {"numbers", numbers},
    {"registers", registers<40, 232, 4>},
    {"registers: never enough", registers<40, 240, 4>},
    {"registers: not all warps", registers<40, 200, 3>},
    {"registers: more by dec", registers<200, 208, 4>},
};

}  // namespace programs
