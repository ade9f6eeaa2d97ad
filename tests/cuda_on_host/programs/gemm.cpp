// The small GEMM, right and with faults.
#include "gemm.h"

#include "programs.h"

namespace programs {
namespace {

struct Size {
    int m, n, k, clusters;
};

template <Major kMajor, int kStages, Fault kFault>
std::string check(const Options& options, Size size) {
    const auto [m, n, k, clusters] = size;
    constexpr bool along_k = kMajor == Major::k;
    Matrix a = along_k ? Matrix(m, k) : Matrix(k, m), c(m, n);
    Matrix b = along_k ? Matrix(n, k, Operand::bf16, 2) : Matrix(k, n, Operand::bf16, 2);
    for (uint16_t& bits : c.bits) bits = 0x7FC0;
    const TensorMap map_a = along_k ? a.map(64, 128) : a.map(64, 64), map_b = b.map(64, 64), map_c = c.map(64, 64);
    const int steps = (k + 63) / 64, tiles_m = (m + 255) / 256, tiles_n = (n + 127) / 128;
    using Kernel = Gemm<kMajor, kStages, kFault>;
    const std::string said = launch({clusters, 2, Kernel::threads, Kernel::shared_bytes}, options, [&] {
        gemm<kMajor, kStages, kFault>(map_a, map_b, map_c, steps, tiles_m, tiles_n);
    });
    std::vector<float> values;
    for (int i = 0; i < m * n; ++i) values.push_back(c(i / n, i % n));
    return compare(said, values, [&](int i) {
        float sum = 0;
        for (int j = 0; j < k; ++j) sum += along_k ? a(i / n, j) * b(i % n, j) : a(j, i / n) * b(j, i % n);
        return widen(nearest<BFloat16>(sum));
    });
}

// One tile a cluster with more steps than stages; more tiles than clusters; odd ends on every side.
template <Major kMajor>
std::string right(const Options& options) {
    std::string said;
    for (const Size size : {Size{256, 128, 320, 1}, Size{256, 384, 192, 2}, Size{392, 200, 104, 3}})
        if (said.empty()) said = check<kMajor, 3, Fault::none>(options, size);
    if (said.empty()) said = check<kMajor, 2, Fault::none>(options, {200, 136, 200, 1});
    return said;
}

template <Fault kFault, Major kMajor = Major::k>
std::string faulty(const Options& options) {
    return check<kMajor, 3, kFault>(options, {256, 384, 320, 2});
}

// For the time that it takes.
std::string tile_pair(const Options& options) { return check<Major::k, 3, Fault::none>(options, {256, 256, 128, 1}); }

}  // namespace

const std::vector<Program> gemm_programs = {
    {"gemm K-major", right<Major::k>},
    {"gemm MN-major", right<Major::mn>},
    {"gemm 256 x 256 x 128", tile_pair},
    {"gemm: stage released early", faulty<Fault::early_release>},
    {"gemm: stage released before its products", faulty<Fault::no_wait_before_release>},
    {"gemm: stage released by one warp for all", faulty<Fault::release_by_one_warp>},
    {"gemm: wrong leading offset", faulty<Fault::wrong_leading, Major::mn>},
    {"gemm: wrong parity", faulty<Fault::wrong_parity>},
    {"gemm: lost arrival on the peer", faulty<Fault::lost_arrival>},
    {"gemm: no fence of the proxies", faulty<Fault::no_proxy_fence>},
    {"gemm: too few bytes expected", faulty<Fault::too_few_bytes>},
    {"gemm: no wait for the products", faulty<Fault::no_wgmma_wait>},
    {"gemm: no wgmma_fence", faulty<Fault::no_wgmma_fence>},
    {"gemm: slot written while it is read", faulty<Fault::no_wait_read>},
    {"gemm: slot without a barrier", faulty<Fault::no_slot_barrier>},
    {"gemm: no fence after initialisation", faulty<Fault::no_init_fence>},
    {"gemm: ends before the peer has done with it", faulty<Fault::no_drain>},
    {"gemm: the peer's half of B", faulty<Fault::wrong_half>},
};

}  // namespace programs
