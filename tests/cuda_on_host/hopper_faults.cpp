// One small product by the kernels of csrc/hopper, -DPROGRAM says which, in a mode of the model and for several seeds;
// prints a line for each: what the model said, or else where values are wrong, or nothing. Arguments: mode, seeds.
#include <cstdlib>
#include <vector>

#include "hopper/epilogues.cuh"
#include "hopper/launch.cuh"
#include "trials.h"

namespace {

using namespace ewa;
using namespace ewa::hopper;
using machine::small_number;

constexpr int num_experts = 2;
constexpr uint16_t nobody_wrote = 0x7FC0;  // NaN

uint16_t rounded(float v) { return nearest<BFloat16>(v).bits; }

// [experts][rows][columns]
struct Tensor {
    int rows, columns;
    std::vector<uint16_t> bits;

    Tensor(int rows, int columns, int seed) : rows(rows), columns(columns) {
        for (int i = 0; i < num_experts * rows * columns; ++i)
            bits.push_back(seed == 0 ? nobody_wrote : rounded(small_number(static_cast<uint32_t>(i + 977 * seed))));
    }
    uint16_t& at(int expert, int row, int column) {
        return bits[static_cast<size_t>((expert * rows + row) * columns + column)];
    }
    float operator()(int expert, int row, int column) { return widen(BFloat16{at(expert, row, column)}); }
    TensorMap map(int box_rows) {
        std::string error;
        const int64_t size = int64_t{rows} * columns;
        return make_map({bits.data(), columns, rows, num_experts, columns, size}, box_rows, error);
    }
};

// A [M, K] · B [K, N], each stored with the index first that is not contiguous.
template <class Shape>
struct Operands {
    int m, n, k;
    Tensor a, b;

    Operands(int m, int n, int k)
        : m(m),
          n(n),
          k(k),
          a(Shape::major_a == Major::k ? Tensor(m, k, 1) : Tensor(k, m, 1)),
          b(Shape::major_b == Major::k ? Tensor(n, k, 2) : Tensor(k, n, 2)) {}

    float product(int expert, int row, int column) {
        float sum = 0.0f;
        for (int i = 0; i < k; ++i)
            sum += (Shape::major_a == Major::k ? a(expert, row, i) : a(expert, i, row)) *
                   (Shape::major_b == Major::k ? b(expert, column, i) : b(expert, i, column));
        return sum;
    }
    template <class Epilogue>
    Maps<Epilogue> maps() {
        Maps<Epilogue> maps;
        maps.a = a.map(Shape::major_a == Major::k ? tile_rows : 64);
        maps.b[0] = maps.b[1] = b.map(Shape::major_b == Major::k ? Shape::columns / 2 : 64);
        return maps;
    }
    Work work() const {
        return {tiles_of(m, 2 * tile_rows), tiles_of(n, Shape::columns), num_experts, tiles_of(k, step_depth)};
    }
    // As many rows of an expert as there are slots.
    Groups groups() const { return {num_experts * m, num_experts, nullptr}; }
};

// What is said, or the first place where values are not as expected.
std::string compare(const std::string& said, const std::vector<uint16_t>& values,
                    const std::vector<uint16_t>& expected) {
    if (!said.empty()) return said;
    for (size_t i = 0; i < values.size(); ++i)
        if (values[i] != expected[i])
            return "values: " + std::to_string(widen(BFloat16{values[i]})) + " at " + std::to_string(i) + ", not " +
                   std::to_string(widen(BFloat16{expected[i]}));
    return {};
}

Owners owners(int num_rows, const std::vector<int>& permutation) {
    return {{{}, static_cast<uint32_t>(num_rows), 1, 1, 0}, permutation.data(), nullptr, 1};
}

// As for gradients of weights: both operands MN-major, more steps than stages, and clipped in every direction.
[[maybe_unused]] std::string cooperative() {
    using Of = Shape<Operand::bf16, Major::mn, Major::mn, 128, 3, false>;
    using Epilogue = StoreSummed<Operand::bf16, false>;
    static Operands<Of> with(200, 136, 424);
    static const std::vector<uint16_t> expected = [] {
        Tensor c(with.m, with.n, 0);
        for (int e = 0; e < num_experts; ++e)
            for (int i = 0; i < c.rows; ++i)
                for (int j = 0; j < c.columns; ++j) c.at(e, i, j) = rounded(with.product(e, i, j));
        return c.bits;
    }();
    Tensor c(with.m, with.n, 0);
    auto maps = with.maps<Epilogue>();
    maps.out[0] = c.map(64);
    const Epilogue::Arguments arguments{nullptr, with.m, 1};
    const std::string said = launch_product<Of>(Task<Epilogue>{maps, with.work(), with.groups(), {}, arguments}, {});
    return compare(said, c.bits, expected);
}

// Up projection: more tiles than clusters, two outputs.
[[maybe_unused]] std::string pingpong() {
    using Of = Shape<Operand::bf16, Major::k, Major::k, 64, 3, true>;
    using Epilogue = StoreHidden<Operand::bf16, 64, Relu, false, false>;
    static Operands<Of> with(301, 136, 136);
    static std::vector<float> bias;
    static const std::vector<uint16_t> expected = [] {
        Tensor hidden(with.m, with.n, 0), pre(with.m, with.n, 0);
        for (size_t i = 0; i < static_cast<size_t>(num_experts * with.n); ++i) bias.push_back(small_number(static_cast<uint32_t>(i + 5)));
        for (int e = 0; e < num_experts; ++e)
            for (int i = 0; i < with.m; ++i)
                for (int j = 0; j < with.n; ++j) {
                    const float sum = with.product(e, i, j) + bias[static_cast<size_t>(e * with.n + j)];
                    pre.at(e, i, j) = rounded(sum);
                    hidden.at(e, i, j) = rounded(sum > 0.0f ? sum : 0.0f);
                }
        hidden.bits.insert(hidden.bits.end(), pre.bits.begin(), pre.bits.end());
        return hidden.bits;
    }();
    Tensor hidden(with.m, with.n, 0), pre(with.m, with.n, 0);
    auto maps = with.maps<Epilogue>();
    maps.out[0] = hidden.map(64);
    maps.out[1] = pre.map(64);
    const Epilogue::Arguments arguments{
        {bias.data(), float32}, with.n, {}, true};
    const std::string said = launch_product<Of>(Task<Epilogue>{maps, with.work(), with.groups(), {}, arguments}, {});
    hidden.bits.insert(hidden.bits.end(), pre.bits.begin(), pre.bits.end());
    return compare(said, hidden.bits, expected);
}

// Down projection: the second expert has a row more than the first. Rows that are no one's go to a row of their own.
[[maybe_unused]] std::string scattered() {
    using Of = Shape<Operand::bf16, Major::k, Major::k, 64, 3, false>;
    using Epilogue = StoreScattered<Operand::bf16, 64>;
    constexpr int slots = 301, num_rows = 2 * slots - 1;
    static Operands<Of> with(slots, 136, 264);
    static std::vector<float> bias;
    static std::vector<int> permutation(4 * 512, num_rows);
    static const std::vector<uint16_t> expected = [] {
        for (size_t i = 0; i < static_cast<size_t>(num_experts * with.n); ++i) bias.push_back(small_number(static_cast<uint32_t>(i + 5)));
        for (int i = 0; i < num_rows; ++i) permutation[static_cast<size_t>(i)] = i * 7 % num_rows;
        std::vector<uint16_t> y(static_cast<size_t>((num_rows + 1) * with.n), nobody_wrote);
        for (int row = 0; row < num_rows; ++row) {
            const int e = row < slots - 1 ? 0 : 1, inside = row - e * (slots - 1);
            for (int j = 0; j < with.n; ++j)
                y[static_cast<size_t>(permutation[static_cast<size_t>(row)] * with.n + j)] =
                    rounded(with.product(e, inside, j) + bias[static_cast<size_t>(e * with.n + j)]);
        }
        return y;
    }();
    std::vector<uint16_t> y(expected.size(), nobody_wrote);
    auto maps = with.maps<Epilogue>();
    maps.out[0] = maps.a;  // not used
    const Epilogue::Arguments arguments{
        {bias.data(), float32}, nullptr, owners(static_cast<int>(permutation.size()), permutation), y.data(), with.n};
    const Groups groups{num_rows, num_experts, nullptr};
    return compare(launch_product<Of>(Task<Epilogue>{maps, with.work(), groups, {}, arguments}, {}), y, expected);
}

// Rows of tokens in reverse order; the second expert has a row more than the first.
[[maybe_unused]] std::string gathered() {
    using Of = Shape<Operand::bf16, Major::k, Major::k, 64, 3, true, true>;
    using Epilogue = StoreHidden<Operand::bf16, 64, Identity, false, false>;
    constexpr int slots = 301, num_rows = 2 * slots - 1;
    static Operands<Of> with(slots, 72, 328);
    static Tensor x(num_rows, 328, 1);
    static std::vector<int> permutation;
    static const std::vector<uint16_t> expected = [] {
        for (int i = 0; i < num_rows; ++i) permutation.push_back(num_rows - 1 - i);
        permutation.push_back(0);  // for a fault that reads too far
        Tensor c(with.m, with.n, 0);
        for (int e = 0; e < num_experts; ++e)
            for (int i = 0; i < c.rows; ++i)
                for (int j = 0; j < c.columns; ++j) {
                    const int row = e * (slots - 1) + i;
                    float sum = 0.0f;  // of no row
                    for (int l = 0; (e == 1 || i < slots - 1) && l < with.k; ++l)
                        sum += x(0, permutation[static_cast<size_t>(row)], l) * with.b(e, j, l);
                    c.at(e, i, j) = rounded(sum);
                }
        return c.bits;
    }();
    Tensor c(with.m, with.n, 0);
    auto maps = with.maps<Epilogue>();
    maps.out[0] = c.map(64);
    const Gather rows{x.bits.data(), with.k, owners(num_rows, permutation)};
    const Groups groups{num_rows, num_experts, nullptr};
    const Epilogue::Arguments arguments{{}, with.n, {}, false};
    const std::string said = launch_product<Of>(Task<Epilogue>{maps, with.work(), groups, rows, arguments}, {});
    return compare(said, c.bits, expected);
}

// Two parts of the sum over K, in float32, and sums of A's rows.
[[maybe_unused]] std::string summed() {
    using Of = Shape<Operand::bf16, Major::mn, Major::mn, 128, 3, false>;
    using Epilogue = StoreSummed<Operand::bf16, true>;
    constexpr int splits = 2, steps = 4;
    static Operands<Of> with(200, 136, 424);
    const auto part = [](int split, auto&& term) {
        float sum = 0.0f;
        for (int k = split * steps * step_depth; k < std::min(with.k, (split + 1) * steps * step_depth); ++k)
            sum += term(k);
        return rounded(sum);
    };
    static const std::vector<uint16_t> expected = [&] {
        std::vector<uint16_t> bits;
        for (int e = 0; e < num_experts; ++e)
            for (int s = 0; s < splits; ++s)
                for (int i = 0; i < with.m; ++i)
                    for (int j = 0; j < with.n; ++j)
                        bits.push_back(part(s, [&](int k) { return with.a(e, k, i) * with.b(e, k, j); }));
        for (int e = 0; e < num_experts; ++e)
            for (int s = 0; s < splits; ++s)
                for (int i = 0; i < with.m; ++i) bits.push_back(part(s, [&](int k) { return with.a(e, k, i); }));
        return bits;
    }();
    const size_t numel = static_cast<size_t>(num_experts * splits * with.m) * static_cast<size_t>(with.n);
    std::vector<float> parts(numel, NAN), sums(static_cast<size_t>(num_experts * splits * with.m), NAN);
    auto maps = with.maps<Epilogue>();
    std::string error;
    maps.out[0] = make_map({parts.data(), with.n, with.m, num_experts * splits, with.n, int64_t{with.m} * with.n, true},
                           64, error);
    Work work = with.work();
    work.parts *= splits;
    work.steps = steps;
    work.splits = splits;
    const std::string said =
        launch_product<Of>(Task<Epilogue>{maps, work, with.groups(), {}, {sums.data(), with.m, splits}}, {});
    std::vector<uint16_t> values;
    for (const auto* of : {&parts, &sums})
        for (float v : *of) values.push_back(rounded(v));
    return compare(said, values, expected);
}

// Both projections in one launch, tokens in reverse order. The third cluster has no tile of the first product: it begins
// with the second while the others are at the first.
[[maybe_unused]] std::string joined() {
    using First = Shape<Operand::bf16, Major::k, Major::k, 64, 3, true, true>;
    using Second = Shape<Operand::bf16, Major::k, Major::k, 64, 3, false>;
    using Hidden = StoreHidden<Operand::bf16, 64, Relu, false, false>;
    using Scattered = StoreScattered<Operand::bf16, 64>;
    constexpr int slots = 200, num_rows = 2 * slots, d = 72, f = 64;
    static Operands<First> up(slots, f, d);
    static Operands<Second> down(slots, d, f);
    static Tensor x(num_rows, d, 1);
    static std::vector<float> bias;
    static std::vector<int> permutation;
    static const std::vector<uint16_t> expected = [] {
        for (int i = 0; i < num_experts * d; ++i) bias.push_back(small_number(static_cast<uint32_t>(i + 5)));
        std::vector<uint16_t> y(static_cast<size_t>(num_rows * d));
        for (int row = 0; row < num_rows; ++row) {
            const int e = row / slots, token = num_rows - 1 - row;
            permutation.push_back(token);
            std::vector<float> hidden;
            for (int j = 0; j < f; ++j) {
                float sum = 0.0f;
                for (int l = 0; l < d; ++l) sum += x(0, token, l) * up.b(e, j, l);
                hidden.push_back(widen(BFloat16{rounded(sum > 0.0f ? sum : 0.0f)}));
            }
            for (int j = 0; j < d; ++j) {
                float sum = bias[static_cast<size_t>(e * d + j)];
                for (int l = 0; l < f; ++l) sum += hidden[static_cast<size_t>(l)] * down.b(e, j, l);
                y[static_cast<size_t>(token * d + j)] = rounded(sum);
            }
        }
        return y;
    }();
    std::vector<uint16_t> y(expected.size(), nobody_wrote);
    std::vector<int> dealt(permutation.size(), 0);  // which the second product reads
    Tensor hidden(slots, f, 0);
    auto of_up = up.maps<Hidden>();
    of_up.out[0] = hidden.map(64);
    auto of_down = down.maps<Scattered>();
    of_down.a = hidden.map(tile_rows);
    of_down.out[0] = of_down.a;  // not used
    std::vector<uint32_t> flags(2 * 2 * static_cast<size_t>(up.work().pairs), 0);
    Owners finds = owners(num_rows, permutation), found = owners(num_rows, dealt);
    finds.dealt = dealt.data();
    const Task<Hidden> first{of_up, up.work(), up.groups(), {x.bits.data(), d, finds}, {{}, f, {}, false}};
    const Task<Scattered> second{
        of_down, down.work(), down.groups(), {}, {{bias.data(), float32}, nullptr, found, y.data(), d}};
    const HandOver hand_over{flags.data(), first.work.columns, second.work.columns};
    multiprocessors_of_launches = 6;
    std::string said = launch_pair<First, Hidden, Second, Scattered>(first, second, hand_over, {});
    for (uint32_t flag : flags)
        if (said.empty() && flag != 0) said = "values: a flag is left";
    return compare(said, y, expected);
}

// Gradients of the pre-activation: slices read blocks beside the product.
[[maybe_unused]] std::string backward() {
    using Of = Shape<Operand::bf16, Major::k, Major::mn, 128, 3, true>;
    using Epilogue = StoreGradPre<Operand::bf16, 128, Relu2, false, false>;
    static Operands<Of> with(301, 264, 72);
    static Tensor pre(301, 264, 3);
    static const std::vector<uint16_t> expected = [] {
        Tensor grad(with.m, with.n, 0), hidden(with.m, with.n, 0);
        for (int e = 0; e < num_experts; ++e)
            for (int i = 0; i < with.m; ++i)
                for (int j = 0; j < with.n; ++j) {
                    const float kept = pre(e, i, j) > 0.0f ? pre(e, i, j) : 0.0f;
                    grad.at(e, i, j) = rounded(with.product(e, i, j) * 2.0f * kept);
                    hidden.at(e, i, j) = rounded(kept * kept);
                }
        grad.bits.insert(grad.bits.end(), hidden.bits.begin(), hidden.bits.end());
        return grad.bits;
    }();
    Tensor grad(with.m, with.n, 0), hidden(with.m, with.n, 0);
    auto maps = with.maps<Epilogue>();
    maps.in[0] = pre.map(64);
    maps.out[0] = grad.map(64);
    maps.out[1] = hidden.map(64);
    const Epilogue::Arguments arguments{{}, nullptr, {}, nullptr, with.n, num_experts * with.m};
    const std::string said = launch_product<Of>(Task<Epilogue>{maps, with.work(), with.groups(), {}, arguments}, {});
    grad.bits.insert(grad.bits.end(), hidden.bits.begin(), hidden.bits.end());
    return compare(said, grad.bits, expected);
}

}  // namespace

int main(int argc, char** argv) {
    const machine::Mode* mode = argc == 3 ? machine::mode_named(argv[1]) : nullptr;
    if (mode == nullptr) return 2;
    for (int seed = 1; seed <= atoi(argv[2]); ++seed) {
        options_of_launches = machine::options_in(*mode, static_cast<uint32_t>(seed));
        printf("%s\n", machine::in_one_line(PROGRAM()).c_str());
    }
}
