// What is checked and decided before a product is launched.
#include "layer.h"

#include <algorithm>
#include <initializer_list>

#include "launch.cuh"
#include "schedule.h"

namespace ewa::hopper {

std::string run_bfloat16(Call call, const Layer& layer, const Operands& operands);
std::string run_float16(Call call, const Layer& layer, const Operands& operands);
std::string forward_bfloat16(const Layer& layer, const Operands& up, const Operands& down, uint32_t* flags);
std::string forward_float16(const Layer& layer, const Operands& up, const Operands& down, uint32_t* flags);
std::string gather_bfloat16(const Layer& layer, const Rows& rows, const Gathered& gathered);
std::string gather_float16(const Layer& layer, const Rows& rows, const Gathered& gathered);

namespace {

bool is_aligned(std::initializer_list<const void*> addresses) {
    return std::all_of(addresses.begin(), addresses.end(),
                       [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; });
}

bool is_size(int size) { return size >= 8 && size % 8 == 0; }

std::string what_is_wrong(const Layer& layer) {
    constexpr int64_t limit = (int64_t{1} << 31) - 1024;  // a row past the end of a tile is an int
    // With slots in which no row is, too.
    const int64_t most_rows = limit - int64_t{layer.is_given ? block_rows : 1} * layer.num_experts;
    if (layer.num_rows < 1 || layer.num_rows > most_rows || layer.num_experts < 1 || layer.num_experts > 32768)
        return "num_rows must be 1 to " + std::to_string(most_rows) + " and num_experts 1 to 32768, got " +
               std::to_string(layer.num_rows) + " and " + std::to_string(layer.num_experts);
    for (int size : {layer.d_model, layer.d_ff})
        if (!is_size(size)) return "sizes must be multiples of 8, got " + std::to_string(size);
    if (layer.where.multiprocessors < 2) return "at least two multiprocessors are needed, for a cluster";
    return {};
}

std::string what_is_wrong(Call call, const Layer& layer, const Operands& o) {
    if (layer.is_given != (layer.table != nullptr)) return "groups that are given need a table, and only they";
    if (call == Call::grad_weight) {
        for (int size : {o.size_m, o.size_n})
            if (!is_size(size)) return "sizes must be multiples of 8, got " + std::to_string(size);
        if (o.splits < 1) return "splits must be at least 1, got " + std::to_string(o.splits);
    }
    if (!is_aligned({o.rows.data, o.a, o.b, o.pre_activation, o.hidden, o.out.data, o.parts, o.part_sums, o.sums.data}))
        return "operands must begin at 16 bytes";
    if (o.rows.by_token) {
        if (o.rows.permutation == nullptr && layer.top_k != 1)
            return "rows that are dealt are tokens: top_k must be 1";
        // Offsets of 16 bytes are 32 bits; the last stands for no row.
        if (int64_t{layer.num_rows} * (layer.d_model / 8) >= (int64_t{1} << 32) - 8)
            return "x by token must be smaller than 64 GiB";
    }
    return {};
}

}  // namespace

int Layer::slots() const { return slots_of(num_rows, num_experts, is_given); }
int Layer::num_flags() const {
    const int of_expert = 2 * pairs_of(num_rows, num_experts, is_given);
    return is_given ? of_expert : of_expert * num_experts;
}
int64_t Layer::table_size() const { return ewa::hopper::table_size(num_rows, num_experts); }

// That with which the clusters of an H200 are done first: 1,024 cycles a step, some 1,500 until a tile of a part is
// stored, and what memory takes to write and read the parts. Not of the device at hand: the order of sums, and so their
// bits, would depend on it.
int splits_of(const Layer& layer, int size_m, int size_n) {
    constexpr int64_t clusters = 66, most = 8;
    const int64_t tiles = layer.num_experts * ceil_div(size_m, 2 * tile_rows) * ceil_div(size_n, weight_columns);
    const int64_t numel = int64_t{layer.num_experts} * size_m * size_n;
    const int64_t steps = ceil_div(ceil_div(layer.num_rows, layer.num_experts), step_depth);
    int64_t best = 1, least = INT64_MAX;
    for (int64_t splits = 1; splits <= std::min(most, steps); ++splits) {
        const int64_t of_tile = 1024 * ceil_div(steps, splits) + (splits == 1 ? 400 : 1500);
        const int64_t of_parts = splits == 1 ? 0 : splits * numel * 27 / 10000;  // 8 bytes, 2,950 a cycle
        const int64_t cycles = ceil_div(tiles * splits, clusters) * of_tile + of_parts;
        if (cycles < least) best = splits, least = cycles;
    }
    return static_cast<int>(best);
}

std::string run(Call call, const Layer& layer, const Operands& operands) {
    std::string wrong = what_is_wrong(layer);
    if (wrong.empty()) wrong = what_is_wrong(call, layer, operands);
    if (wrong.empty()) wrong = choose(layer.where);
    if (!wrong.empty()) return wrong;
    return (layer.is_bfloat16 ? run_bfloat16 : run_float16)(call, layer, operands);
}

std::string forward(const Layer& layer, const Operands& up, const Operands& down, uint32_t* flags) {
    std::string wrong = what_is_wrong(layer);
    if (wrong.empty()) wrong = what_is_wrong(Call::up, layer, up);
    if (wrong.empty()) wrong = what_is_wrong(Call::down, layer, down);
    if (wrong.empty() && !up.rows.by_token) wrong = "one launch is for rows by token";
    if (wrong.empty()) wrong = choose(layer.where);
    if (!wrong.empty()) return wrong;
    return (layer.is_bfloat16 ? forward_bfloat16 : forward_float16)(layer, up, down, flags);
}

std::string gather(const Layer& layer, const Rows& rows, const Gathered& to) {
    std::string wrong = what_is_wrong(layer);
    if (wrong.empty() && !is_aligned({rows.data, to.x, to.grad_y, to.of_grad_y, to.weighted}))
        wrong = "operands must begin at 16 bytes";
    if (wrong.empty()) wrong = choose(layer.where);
    if (!wrong.empty()) return wrong;
    return (layer.is_bfloat16 ? gather_bfloat16 : gather_float16)(layer, rows, to);
}

std::string tabulate(const Layer& layer, const int32_t* expert_offsets, int32_t* table) {
    std::string wrong = what_is_wrong(layer);
    if (wrong.empty()) wrong = choose(layer.where);
    if (!wrong.empty()) return wrong;
    return launch_simple(tabulate_kernel<32>, 1, 32, layer.where, expert_offsets, layer.num_rows, layer.num_experts,
                         table);
}

}  // namespace ewa::hopper
