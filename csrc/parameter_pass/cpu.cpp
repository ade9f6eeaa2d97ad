#include <algorithm>

#include "elements.h"
#include "parameter_pass.h"
#include "random.h"

namespace ewa {
namespace {

// Columns (elements of each expert) that a thread takes at a time.
constexpr int64_t tile_columns = 65536;
// Between AdamW and averaging the parameters of all experts wait in the second cache. Shorter runs through memory cost
// more than what a nearer cache saves.
constexpr int64_t block_elements = 65536;
// The last expert's AdamW step and averaging take turns after so few columns that the processor does the one while the
// other waits for memory. Of many experts more columns: their sums stay in the first cache all the same.
constexpr int64_t turn_columns = 64, slice_columns = 512;

struct Pass {
    const Table* table;
    std::vector<Adam<double>> adams;  // of each member: they take longer than a short run through memory
    double share_rate;
    bool unscale, stochastic;
    RandomKeys keys;
};

template <class T>
EWA_INLINE void adam_step(const Pass& pass, const Member& member, int64_t k, int64_t n) {
    using W = Wide<T>;
    const Adam<W> adam = pass.adams[&member - pass.table->members.data()].template to<W>();
    T* __restrict param = static_cast<T*>(member.param) + k;
    T* __restrict grad = static_cast<T*>(member.grad) + k;
    T* __restrict exp_avg = static_cast<T*>(member.exp_avg) + k;
    T* __restrict exp_avg_sq = static_cast<T*>(member.exp_avg_sq) + k;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
        W g = widen(grad[j]), m = widen(exp_avg[j]), v = widen(exp_avg_sq[j]);
        param[j] = nearest<T>(adam(widen(param[j]), g, m, v));
        exp_avg[j] = nearest<T>(m);
        exp_avg_sq[j] = nearest<T>(v);
    }
    if (pass.unscale)
        for (int64_t j = 0; j < n; ++j) grad[j] = nearest<T>(widen(grad[j]) * adam.unscale);
}

// A number of experts that the compiler knows: they stay in registers.
template <class T, int kExperts>
EWA_INLINE void average_few(const Pass& pass, const Group& group, const Member* members, int64_t k, int64_t n) {
    using W = Wide<T>;
    const Pull<W> pull = Pull<W>::of(pass.share_rate, kExperts);
    const W share = W(1) / static_cast<W>(kExperts);
    T* __restrict params[kExperts];
    uint32_t of_expert[kExperts];
    for (int e = 0; e < kExperts; ++e) {
        params[e] = static_cast<T*>(members[e].param) + k;
        of_expert[e] = pass.keys.of_expert(group.number + e);
    }
    const bool stochastically = pass.stochastic && sizeof(T) == 2;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
        W values[kExperts], distances = 0;
        for (int e = 0; e < kExperts; ++e) {
            values[e] = widen(params[e][j]);
            distances += values[e] - values[0];
        }
        // The mean of distances from the first expert: equal experts have exactly their value for a mean.
        const W mean = values[0] + distances * share;
        const uint32_t of_element = stochastically ? pass.keys.of_element(k + j) : 0;
        for (int e = 0; e < kExperts; ++e) {
            const W pulled = pull(values[e], mean);
            params[e][j] = stochastically ? stochastic<T>(pulled, random_bits(of_expert[e], of_element, k + j))
                                          : nearest<T>(pulled);
        }
    }
}

// Any number of them: summed up in the first cache, and read there again.
template <class T>
EWA_INLINE void average_many(const Pass& pass, const Group& group, const Member* members, int64_t k, int64_t n) {
    using W = Wide<T>;
    const int num_experts = group.num_experts;
    const Pull<W> pull = Pull<W>::of(pass.share_rate, num_experts);
    const W share = W(1) / static_cast<W>(num_experts);
    const bool stochastically = pass.stochastic && sizeof(T) == 2;
    W mean[slice_columns];
    uint32_t of_element[slice_columns] = {};
    const T* __restrict first = static_cast<const T*>(members[0].param) + k;
    for (int64_t j = 0; j < n; ++j) mean[j] = 0;
    for (int e = 1; e < num_experts; ++e) {
        const T* __restrict param = static_cast<const T*>(members[e].param) + k;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) mean[j] += widen(param[j]) - widen(first[j]);
    }
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) mean[j] = widen(first[j]) + mean[j] * share;
    if (stochastically)
        for (int64_t j = 0; j < n; ++j) of_element[j] = pass.keys.of_element(k + j);
    for (int e = 0; e < num_experts; ++e) {
        T* __restrict param = static_cast<T*>(members[e].param) + k;
        const uint32_t of_expert = pass.keys.of_expert(group.number + e);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
            const W pulled = pull(widen(param[j]), mean[j]);
            param[j] = stochastically ? stochastic<T>(pulled, random_bits(of_expert, of_element[j], k + j))
                                      : nearest<T>(pulled);
        }
    }
}

template <class T>
EWA_INLINE void write_copy(const Member& member, int64_t k, int64_t n) {
    const T* __restrict param = static_cast<const T*>(member.param) + k;
    uint16_t* __restrict copy = member.copy + k;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) copy[j] = nearest<BFloat16>(static_cast<float>(widen(param[j]))).bits;
}

// The last expert's AdamW step, averaging and copies, by turns. `kExperts`: those averaged; 1 for none, 0 for any number.
template <class T, int kExperts>
EWA_INLINE void take_turns(const Pass& pass, const Group& group, const Member* members, int64_t begin, int64_t end) {
    const Member& last = members[group.num_experts - 1];
    const int64_t turn = kExperts == 0 ? slice_columns : kExperts == 1 ? end - begin : turn_columns;
    for (int64_t k = begin; k < end; k += turn) {
        const int64_t n = std::min(turn, end - k);
        if (last.grad != nullptr) adam_step<T>(pass, last, k, n);
        if constexpr (kExperts == 0)
            average_many<T>(pass, group, members, k, n);
        else if constexpr (kExperts > 1)
            average_few<T, kExperts>(pass, group, members, k, n);
        for (int e = 0; e < group.num_experts; ++e)
            if (members[e].copy != nullptr) write_copy<T>(members[e], k, n);
    }
}

template <class T>
EWA_INLINE void tile(const Pass& pass, const Group& group, int64_t begin, int64_t end) {
    const Member* members = pass.table->members.data() + group.first_member;
    const int num_experts = group.num_experts;
    const bool steps = std::any_of(members, members + num_experts, [](const Member& m) { return m.grad != nullptr; });
    // Alone, averaging reads memory itself.
    const int64_t block = steps ? std::max(slice_columns, block_elements / num_experts) : end - begin;
    for (int64_t k = begin; k < end; k += block) {
        const int64_t block_end = std::min(k + block, end);
        for (int e = 0; e < num_experts - 1; ++e)
            if (members[e].grad != nullptr) adam_step<T>(pass, members[e], k, block_end - k);
        switch (pass.share_rate != 0 ? num_experts : 1) {
            case 1: take_turns<T, 1>(pass, group, members, k, block_end); break;
            case 2: take_turns<T, 2>(pass, group, members, k, block_end); break;
            case 3: take_turns<T, 3>(pass, group, members, k, block_end); break;
            case 4: take_turns<T, 4>(pass, group, members, k, block_end); break;
            default: take_turns<T, 0>(pass, group, members, k, block_end);
        }
    }
}

// In a function of its own: a loop inside an OpenMP region cannot be cloned per processor.
EWA_CLONES void any_tile(const Pass& pass, const Group& group, int64_t begin, int64_t end) {
    switch (group.type) {
        case Type::float32: return tile<float>(pass, group, begin, end);
        case Type::float64: return tile<double>(pass, group, begin, end);
        case Type::float16: return tile<Half>(pass, group, begin, end);
        case Type::bfloat16: return tile<BFloat16>(pass, group, begin, end);
    }
}

}  // namespace

void parameter_pass_cpu(const Table& table, const Scalars& scalars) {
    if (scalars.found_inf != nullptr && *scalars.found_inf != 0) return;
    const float grad_scale = scalars.grad_scale == nullptr ? 1.0f : *scalars.grad_scale;
    Pass pass{&table, {}, scalars.share_rate, grad_scale != 1.0f, scalars.stochastic != 0, RandomKeys(scalars.seed)};
    for (const Member& member : table.members) {
        pass.adams.emplace_back();
        if (member.grad == nullptr) continue;
        const Options& options = table.options[member.options];
        pass.adams.back() = Adam<double>::of(options, options.lr, *member.step, grad_scale);
    }
    // (group, first column) of every tile, group by group.
    struct Tile {
        const Group* group;
        int64_t begin;
    };
    std::vector<Tile> tiles;
    for (const Group& group : table.groups)
        for (int64_t begin = 0; begin < group.numel; begin += tile_columns) tiles.push_back({&group, begin});
    // Experts' tiles take several times as long as others.
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < static_cast<int64_t>(tiles.size()); ++i)
        any_tile(pass, *tiles[i].group, tiles[i].begin, std::min(tiles[i].begin + tile_columns, tiles[i].group->numel));
    for (const Member& member : table.members)
        if (member.grad != nullptr && member.counts) *member.step += 1;
}

}  // namespace ewa
