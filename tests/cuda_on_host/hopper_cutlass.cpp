// What csrc/hopper believes of operands, accumulators and stmatrix, against CUTLASS's layouts. Prints "name: number of
// differences of number compared" for each.
#include <cstdio>
#include <cstdlib>
#include <cute/arch/copy_sm90.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "hopper/descriptors.h"

namespace {

using namespace cute;
namespace hopper = ewa::hopper;
using Element = cutlass::bfloat16_t;

struct Comparison {
    const char* name;
    int differences = 0, compared = 0;

    explicit Comparison(const char* name) : name(name) {}
    ~Comparison() { printf("%s: %d of %d\n", name, differences, compared); }
    template <class T>
    void operator()(T ours, T theirs) {
        ++compared;
        differences += ours != theirs;
    }
};

// Aligned as a stage is, or more: their swizzles work on addresses.
char* buffer() {
    static char* const memory = static_cast<char*>(aligned_alloc(65536, 65536));
    return memory;
}

template <class Layout>
auto tensor_of(Layout layout) {
    return make_tensor(make_smem_ptr(reinterpret_cast<Element*>(buffer())), layout);
}

template <class Layout>
uint32_t offset(Layout layout, int row, int k) {
    auto tensor = tensor_of(layout);
    return static_cast<uint32_t>(reinterpret_cast<char*>(raw_pointer_cast(&tensor(row, k))) - buffer());
}

// Rows of 64 k, or groups of 64 mn one after the other with 64 k each.
template <int kRows>
auto k_major() {
    return tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{}, Shape<Int<kRows>, _64>{});
}
template <int kRows>
auto mn_major() {
    return tile_to_shape(GMMA::Layout_MN_SW128_Atom<Element>{}, Shape<Int<kRows>, _64>{}, Step<_2, _1>{});
}

uint32_t our_k_major(int row, int k) { return hopper::swizzled_offset(row, k / 8) + k % 8 * 2; }
uint32_t our_mn_major(int mn, int k) {
    return mn / 64 * hopper::atom_bytes + hopper::swizzled_offset(k, mn % 64 / 8) + mn % 8 * 2;
}

// All of the descriptor but its address. A leading offset is not used where there is one group of 64 mn.
template <GMMA::Major kTheirs, hopper::Major kOurs, int kRows, class Layout>
void compare_descriptor(Comparison& compare, Layout layout) {
    const auto slice = composition(layout, make_layout(Shape<Int<kRows>, _16>{}, make_stride(_1{}, size<0>(layout))));
    uint64_t theirs = SM90::GMMA::make_gmma_desc<kTheirs>(tensor_of(slice)).desc_;
    uint64_t used = ~uint64_t{0x3FFF};
    if (kOurs == hopper::Major::mn && kRows == 64) used &= ~(uint64_t{0x3FFF} << 16);
    compare(hopper::make_descriptor<kOurs>(0) & used, theirs & used);
}

void descriptors() {
    constexpr auto their_k = GMMA::Major::K, their_mn = GMMA::Major::MN;
    constexpr auto k = hopper::Major::k, mn = hopper::Major::mn;
    {
        Comparison compare("descriptors, K-major");
        compare_descriptor<their_k, k, 64>(compare, k_major<128>());
        compare_descriptor<their_k, k, 64>(compare, k_major<64>());
        compare_descriptor<their_k, k, 96>(compare, k_major<96>());
        compare_descriptor<their_k, k, 128>(compare, k_major<128>());
        compare_descriptor<their_k, k, 192>(compare, k_major<192>());
        compare_descriptor<their_k, k, 256>(compare, k_major<256>());
    }
    {
        Comparison compare("descriptors, MN-major");
        compare_descriptor<their_mn, mn, 64>(compare, mn_major<128>());
        compare_descriptor<their_mn, mn, 64>(compare, mn_major<64>());
        compare_descriptor<their_mn, mn, 128>(compare, mn_major<128>());
        compare_descriptor<their_mn, mn, 256>(compare, mn_major<256>());
    }
    Comparison compare("steps");
    for (int i = 0; i < 4; ++i) {
        const auto at = static_cast<uint32_t>(i);
        const auto step_k = static_cast<uint32_t>(hopper::descriptor_next_k16<k>);
        const auto step_mn = static_cast<uint32_t>(hopper::descriptor_next_k16<mn>);
        const auto rows = static_cast<uint32_t>(hopper::descriptor_next_64_rows);
        compare(16 * at * step_k, offset(k_major<256>(), 0, 16 * i));
        compare(16 * at * step_mn, offset(mn_major<256>(), 0, 16 * i));
        compare(16 * at * rows, offset(k_major<256>(), 64 * i, 0));
        compare(16 * at * rows, offset(mn_major<256>(), 64 * i, 0));
    }
}

void elements() {
    {
        Comparison compare("elements, K-major");
        for (int row = 0; row < 256; ++row)
            for (int k = 0; k < 64; ++k) compare(our_k_major(row, k), offset(k_major<256>(), row, k));
    }
    {
        Comparison compare("elements, MN-major");
        for (int mn = 0; mn < 256; ++mn)
            for (int k = 0; k < 64; ++k) compare(our_mn_major(mn, k), offset(mn_major<256>(), mn, k));
    }
    // Another order of the same atoms: that a comparison can fail.
    Comparison compare("elements, another order");
    const auto other = tile_to_shape(GMMA::Layout_MN_SW128_Atom<Element>{}, Shape<_256, _64>{});
    for (int mn = 0; mn < 256; ++mn)
        for (int k = 0; k < 64; ++k) compare(our_mn_major(mn, k), offset(other, mn, k));
}

// Row and column of an accumulator, as wgmma.cuh says.
int our_row(int thread, int i) { return thread / 32 * 16 + i / 2 % 2 * 8 + thread % 32 / 4; }
int our_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

template <class Wgmma, int kN>
void accumulators(Comparison& compare) {
    const typename MMA_Traits<Wgmma>::CLayout theirs{};
    for (int thread = 0; thread < 128; ++thread)
        for (int i = 0; i < kN / 2; ++i)
            compare(our_row(thread, i) + 64 * our_column(thread, i), static_cast<int>(theirs(thread, i)));
}

// Where `put_columns` leaves 64 × 64 accumulators, by their stmatrix, and where a K-major tile has them.
void slices() {
    Comparison compare("stmatrix");
    using Traits = Copy_Traits<SM90_U32x4_STSM_N>;
    const typename Traits::SrcLayout from{};  // (lane, bit of its registers) to a bit of all, row by row
    for (int thread = 0; thread < 128; ++thread)
        for (int i = 0; i < 32; ++i) {
            const int j = i / 8, bit = static_cast<int>(from(thread % 32, i % 8 * 16));
            const int lane = bit / 128;  // that gives the row's address
            const uint32_t row = static_cast<uint32_t>(thread / 32 * 16 + (lane & 15));
            const uint32_t to = hopper::swizzled_offset(row, static_cast<uint32_t>(2 * j + (lane >> 4)));
            compare(to + static_cast<uint32_t>(bit % 128 / 8),
                    offset(k_major<64>(), our_row(thread, i), our_column(thread, i)));
        }
}

}  // namespace

int main() {
    descriptors();
    elements();
    {
        constexpr auto k = GMMA::Major::K;
        Comparison compare("accumulators");
        accumulators<SM90_64x64x16_F32BF16BF16_SS<k, k>, 64>(compare);
        accumulators<SM90_64x96x16_F32BF16BF16_SS<k, k>, 96>(compare);
        accumulators<SM90_64x128x16_F32BF16BF16_SS<k, k>, 128>(compare);
        accumulators<SM90_64x192x16_F32BF16BF16_SS<k, k>, 192>(compare);
        accumulators<SM90_64x256x16_F32BF16BF16_SS<k, k>, 256>(compare);
    }
    slices();
}
