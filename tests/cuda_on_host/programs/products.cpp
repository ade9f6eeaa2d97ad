// wgmma: one warpgroup, operands that threads wrote.
#include "programs.h"

namespace programs {
namespace {

enum class Fault {
    none, no_wait, waits_for_fewer, no_commit, no_fence, no_proxy_fence, wrong_leading, wrong_stride, wrong_major,
    no_swizzle, lanes_differ, warps_differ, a_warp_less, half_a_warp, written_in_flight, too_few_registers,
};

// k is 64. Where element (mn, k) of an operand is.
template <Major kMajor>
uint32_t offset_of(int mn, int k) {
    if (kMajor == Major::k) return swizzled_offset(mn, k / 8) + k % 8 * 2;
    return mn / 64 * atom_bytes + swizzled_offset(k, mn % 64 / 8) + mn % 8 * 2;
}

template <Major kMajor>
void fill(uint32_t at, const Matrix& from) {
    constexpr bool along_k = kMajor == Major::k;
    for (int i = thread_id(); i < from.rows * 32; i += 128) {
        const int mn = along_k ? i / 32 : i / 64 * 2, k = along_k ? i % 32 * 2 : i % 64;
        const uint16_t* low = &from.bits[mn * 64 + k];
        const uint32_t high = low[along_k ? 1 : 64];
        store_shared_u32(at + offset_of<kMajor>(mn, k), *low | high << 16);
    }
}

template <int kN, Operand kType, Major kA, Major kB, Fault kFault>
void multiply(uint32_t a, uint32_t b, float (&d)[kN / 2]) {
    uint64_t at_a = make_descriptor<kA>(a), at_b = make_descriptor<kB>(b);
    if (kFault == Fault::wrong_leading) at_b = make_descriptor(b, 1024, 1024);
    if (kFault == Fault::wrong_stride) at_b = make_descriptor(b, atom_bytes, 2048);
    if (kFault == Fault::no_swizzle) at_b &= ~(3ull << 62);
    if (kFault == Fault::lanes_differ && lane_id() == 7) at_a += descriptor_next_k16<kA>;
    if (kFault == Fault::warps_differ && warp_id() == 2) at_b += descriptor_next_k16<kB>;
    constexpr Major major_b = kFault == Fault::wrong_major ? Major::mn : kB;
    if (kFault != Fault::no_fence) wgmma_fence();
    for (int k = 0; k < 4; ++k) {
        if (kFault == Fault::half_a_warp && lane_id() < 16) continue;
        if (kFault == Fault::a_warp_less && k == 3 && warp_id() == 1) continue;
        wgmma<kN, kType, kA, major_b>(d, at_a + k * descriptor_next_k16<kA>, at_b + k * descriptor_next_k16<kB>, k > 0);
        if (kFault == Fault::written_in_flight && k == 2) d[3] = 1.0f;
        if (k % 2 == 1 && kFault != Fault::no_commit) wgmma_commit();
    }
    if (kFault == Fault::waits_for_fewer)
        wgmma_wait<1>();
    else if (kFault != Fault::no_wait)
        wgmma_wait<0>();
    pin(d);
}

template <int kN, Operand kType, Major kA, Major kB, Fault kFault = Fault::none>
std::string product(const Options& options) {
    const Matrix a(64, 64, kType, 1), b(kN, 64, kType, 2);
    std::vector<float> out(64 * kN, NAN);
    Options few = options;
    if (kFault == Fault::too_few_registers) few.registers = kN / 2 - 8;
    const std::string said = launch({1, 1, 128, 65536}, few, [&] {
        const uint32_t at_a = shared_memory(), at_b = at_a + 8192;
        fill<kA>(at_a, a);
        fill<kB>(at_b, b);
        if (kFault != Fault::no_proxy_fence) fence_proxy_async_shared();
        named_barrier_sync(0, 128);
        float d[kN / 2];
        multiply<kN, kType, kA, kB, kFault>(at_a, at_b, d);
        const int row = 16 * warp_id() + lane_id() / 4, column = lane_id() % 4 * 2;
        for (int i = 0; i < kN / 2; ++i)
            out[(row + 8 * (i / 2 % 2)) * kN + column + i / 4 * 8 + i % 2] = d[i];
        if (kFault == Fault::no_wait || kFault == Fault::waits_for_fewer) wgmma_wait<0>();
    });
    return compare(said, out, [&a, &b](int i) {
        float sum = 0;
        for (int k = 0; k < 64; ++k) sum += a(i / kN, k) * b(i % kN, k);
        return sum;
    });
}

template <Operand kType, Major kA, Major kB>
std::string all_sizes(const Options& options) {
    std::string said;
    for (const auto run : {product<8, kType, kA, kB>, product<64, kType, kA, kB>, product<96, kType, kA, kB>,
                           product<128, kType, kA, kB>, product<192, kType, kA, kB>, product<256, kType, kA, kB>})
        if (said.empty()) said = run(options);
    return said;
}

constexpr Major k = Major::k, mn = Major::mn;
constexpr Operand bf16 = Operand::bf16, f16 = Operand::f16;

// Descriptors, field by field.
std::string descriptors(const Options&) {
    const auto is = [](uint64_t d, uint64_t start, uint64_t leading, uint64_t stride) {
        return d == (start | leading << 16 | stride << 32 | 1ull << 62);
    };
    const bool right = is(make_descriptor<k>(0x2400), 0x240, 1, 64) &&
                       is(make_descriptor<mn>(0x2400), 0x240, 512, 64) &&
                       is(make_descriptor<k>(0x37C00) + descriptor_next_k16<k>, 0x37C2, 1, 64) &&
                       is(make_descriptor<mn>(0) + descriptor_next_k16<mn>, 128, 512, 64) &&
                       is(make_descriptor<mn>(0) + descriptor_next_64_rows, 512, 512, 64) &&
                       descriptor_step(2048) == 128;
    return right ? "" : "values: a descriptor";
}

}  // namespace

const std::vector<Program> product_programs = {
    {"descriptors", descriptors},
    {"product bf16: K-major, K-major", all_sizes<bf16, k, k>},
    {"product bf16: K-major, MN-major", all_sizes<bf16, k, mn>},
    {"product bf16: MN-major, MN-major", all_sizes<bf16, mn, mn>},
    {"product f16: MN-major, K-major", all_sizes<f16, mn, k>},
    {"product f16: K-major, K-major", all_sizes<f16, k, k>},
    {"product: no wait", product<64, bf16, k, k, Fault::no_wait>},
    {"product: waits for fewer groups", product<64, bf16, k, k, Fault::waits_for_fewer>},
    {"product: not committed", product<64, bf16, k, k, Fault::no_commit>},
    {"product: no wgmma_fence", product<64, bf16, k, k, Fault::no_fence>},
    {"product: no fence of the proxies", product<64, bf16, k, k, Fault::no_proxy_fence>},
    {"product: wrong leading offset", product<128, bf16, mn, mn, Fault::wrong_leading>},
    {"product: wrong stride offset", product<64, bf16, k, k, Fault::wrong_stride>},
    {"product: wrong major", product<64, bf16, k, k, Fault::wrong_major>},
    {"product: no swizzle", product<64, bf16, k, k, Fault::no_swizzle>},
    {"product: lanes differ", product<64, bf16, k, k, Fault::lanes_differ>},
    {"product: warps differ", product<64, bf16, k, k, Fault::warps_differ>},
    {"product: a warp has one less", product<64, bf16, k, k, Fault::a_warp_less>},
    {"product: half a warp", product<64, bf16, k, k, Fault::half_a_warp>},
    {"product: written in flight", product<64, bf16, k, k, Fault::written_in_flight>},
    {"product: too few registers", product<128, bf16, k, k, Fault::too_few_registers>},
};

}  // namespace programs
