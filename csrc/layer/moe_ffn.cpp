#include "moe_ffn.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "permutation.h"

namespace ewa {
namespace {

constexpr int64_t alignment = 64;

// Where part i of `count` about equal ones starts.
int64_t part(int64_t total, int64_t i, int64_t count) { return total * i / count; }

// In float32: the bias itself, or `to`, filled with it.
const float* floats(const void* bias, Type type, int64_t n, float* to) {
    if (bias == nullptr || type == Type::float32) return static_cast<const float*>(bias);
    widen_row(type, n, static_cast<const uint16_t*>(bias), to);
    return to;
}

}  // namespace

LayerPass::LayerPass(const Layer& layer, const int32_t* expert_offsets, int64_t block_rows, bool backward)
    : layer_(layer), backward_(backward) {
    const int64_t experts = layer.num_experts, total = layer.num_rows();
    const auto offset = [&](int64_t e) -> int64_t {
        return expert_offsets != nullptr ? expert_offsets[e] : part(total, e, experts);
    };
    const int64_t count = std::max<int64_t>(std::llrint(static_cast<double>(total) / block_rows), 1);
    int64_t saved = 0;
    for (int64_t b = 0; b < count; ++b) {
        RowBlock block{{}, {}, 0, saved};
        for (int64_t e = 0; e < experts; ++e) {
            const int64_t own = offset(e + 1) - offset(e), first = part(own, b, count);
            block.first.push_back(offset(e) + first);
            block.counts.push_back(part(own, b + 1, count) - first);
            block.rows += block.counts.back();
        }
        saved += block.rows;
        most_rows_ = std::max(most_rows_, block.rows);
        blocks_.push_back(std::move(block));
    }
    const int64_t d_model = layer.d_model, d_ff = layer.d_ff, num_up = layer.num_up();
    const auto need = [&](int64_t floats) { workspace_floats_ = std::max(workspace_floats_, floats); };
    for (const RowBlock& block : blocks_) {
        need(workspace_floats(times(block, d_model, num_up, {}, {}, true)));
        if (backward) {
            need(workspace_floats(times(block, d_model, d_ff, {}, {}, false)));
            need(workspace_floats(times(block, num_up, d_model, {}, {}, false)));
                    for (const auto& [m, n] : {std::pair(d_model, d_ff), {d_model, 0}, {num_up, d_model}, {num_up, 0}})
                need(workspace_floats(outer(block, m, n, {}, {})));
        } else {
            need(workspace_floats(times(block, d_ff, d_model, {}, {}, true)));
        }
    }
}

std::vector<std::vector<int64_t>> LayerPass::counts() const {
    std::vector<std::vector<int64_t>> counts;
    for (const RowBlock& block : blocks_) counts.push_back(block.counts);
    return counts;
}

LayerPass::Memory::Memory(const LayerPass& pass, char* start) {
    const Layer& layer = pass.layer_;
    const int64_t size = layer.bfloat16 ? 2 : 4, most = pass.most_rows_;
    const auto take = [&](auto*& to, int64_t need) {
        to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(reinterpret_cast<uintptr_t>(start) + bytes);
        bytes += (need + alignment - 1) / alignment * alignment;
    };
    take(rows, most * 8);
    take(choices, most * 8);
    take(tokens, most * 8);
    take(factor, most * 4);
    take(grad_factor, most * 4);
    take(up_bias, layer.num_experts * layer.num_up() * 4);
    take(down_bias, layer.num_experts * layer.d_model * 4);
    take(hidden, most * layer.d_ff * size);
    take(pre, pass.backward_ ? most * layer.num_up() * size : 0);
    take(grad_pre, pass.backward_ ? most * layer.num_up() * size : 0);
    take(workspace, pass.workspace_floats_ * 4);
}

void LayerPass::Memory::look_up(const LayerPass& pass, const RowBlock& block, const Inputs& inputs) const {
    int64_t i = 0;
    for (size_t e = 0; e < block.counts.size(); ++e)
        for (int64_t row = block.first[e]; row < block.first[e] + block.counts[e]; ++row, ++i) {
            const int64_t choice = inputs.permutation[row];
            rows[i] = row;
            choices[i] = choice;
            tokens[i] = choice / pass.layer_.top_k;
            if (inputs.routing_weights != nullptr) factor[i] = inputs.routing_weights[choice];
        }
}

Block LayerPass::rows_of(const RowBlock& block, const Inputs& inputs, const Memory& memory) const {
    return {block.rows, 1, layer_.d_ff, layer_.gated, memory.rows, inputs.seed, layer_.dropout_p};
}

TimesWeights LayerPass::times(const RowBlock& block, int64_t k, int64_t n, Tokens tokens, Matrix weights,
                         bool transposed) const {
    return {Groups(block.counts), k, n, tokens, {weights, transposed}, layer_.bfloat16, threads_};
}

Outer LayerPass::outer(const RowBlock& block, int64_t m, int64_t n, Tokens left, Tokens right) const {
    return {Groups(block.counts), m, n, left, right, layer_.bfloat16, threads_};
}

Kept LayerPass::kept(const RowBlock& block, const Inputs& inputs) const {
    Kept all{tokens(inputs.pre_activation)};
    if (layer_.format != nullptr && inputs.pre_activation != nullptr) {
        all.format = layer_.format.get();
        all.codes = static_cast<uint8_t*>(inputs.pre_activation);
        all.scales = all.from(layer_.num_rows(), layer_.num_up()).codes;
        all.matrix.at = nullptr;
    }
    return all.from(block.saved, layer_.num_up());
}

void LayerPass::forward(const Inputs& inputs, bool deal, void* y, char* start) const {
    const Memory memory(*this, start);
    if (deal) random_permutation(layer_.num_tokens, inputs.seed, inputs.permutation);
    const int64_t d_model = layer_.d_model, d_ff = layer_.d_ff, num_up = layer_.num_up(), experts = layer_.num_experts;
    const float* const up_bias = floats(inputs.up_bias, layer_.up_bias, experts * num_up, memory.up_bias);
    const float* const down_bias = floats(inputs.down_bias, layer_.down_bias, experts * d_model, memory.down_bias);
    for (const RowBlock& block : blocks_) {
        memory.look_up(*this, block, inputs);
        const Matrix hidden = scratch(memory.hidden);
        const Kept pre = kept(block, inputs);
        multiply(times(block, d_model, num_up, {tokens(inputs.x), memory.tokens, nullptr},
                       {inputs.up_weight, layer_.up_weight}, true),
                 memory.workspace, pre.matrix.type == Type::float32 ? static_cast<float*>(pre.matrix.at) : nullptr,
                 activate_rows(layer_.activation, rows_of(block, inputs, memory), up_bias, pre, hidden));
        multiply(times(block, d_ff, d_model, {hidden, nullptr, nullptr},
                       {inputs.down_weight, layer_.down_weight}, true),
                 memory.workspace, nullptr,
                 scatter_to_rows(d_model, down_bias, inputs.routing_weights == nullptr ? nullptr : memory.factor,
                                 memory.choices, tokens(y)));
    }
}

void LayerPass::backward(const Inputs& inputs, const void* grad_y, const Gradients& gradients, char* start) const {
    const Memory memory(*this, start);
    const int64_t d_model = layer_.d_model, d_ff = layer_.d_ff, num_up = layer_.num_up(), experts = layer_.num_experts;
    const float* const up_bias = floats(inputs.up_bias, layer_.up_bias, experts * num_up, memory.up_bias);
    const bool need_up = gradients.up_weight.at != nullptr || gradients.up_bias != nullptr;
    const bool need_pre = need_up || gradients.x != nullptr || gradients.routing_weights != nullptr;
    const bool need_down_weight = gradients.down_weight.at != nullptr;
    const Matrix hidden = scratch(memory.hidden), grad_pre = scratch(memory.grad_pre);
    const Matrix up_weight{inputs.up_weight, layer_.up_weight}, down_weight{inputs.down_weight, layer_.down_weight};
    float beta = 0;  // the first block writes gradients of parameters, others add to them
    for (const RowBlock& block : blocks_) {
        memory.look_up(*this, block, inputs);
        const float* const factor = inputs.routing_weights == nullptr ? nullptr : memory.factor;
        const Tokens x{tokens(inputs.x), memory.tokens, nullptr};
        const Block rows = rows_of(block, inputs, memory);
        if (need_pre || need_down_weight) {
            Kept pre = kept(block, inputs);
            if (!pre.is_there()) {
                pre = {scratch(memory.pre)};
                multiply(times(block, d_model, num_up, x, up_weight, true), memory.workspace,
                         pre.matrix.type == Type::float32 ? static_cast<float*>(pre.matrix.at) : nullptr,
                         activate_rows(layer_.activation, rows, up_bias, pre, {nullptr, Type::float32}));
            }
            if (need_pre) {
                float* const grad_factor = gradients.routing_weights == nullptr ? nullptr : memory.grad_factor;
                multiply(times(block, d_model, d_ff, {tokens(grad_y), memory.tokens, nullptr}, down_weight, false),
                         memory.workspace, nullptr,
                         activate_backward_rows(layer_.activation, rows, pre, factor, grad_pre, hidden, grad_factor));
                const float* const of_bias = gradients.of_bias_factor;
                for (int64_t i = 0; grad_factor != nullptr && i < block.rows; ++i)
                    gradients.routing_weights[memory.choices[i]] =
                        grad_factor[i] + (of_bias == nullptr ? 0 : of_bias[memory.rows[i]]);
            } else {
                if (pre.format != nullptr) {
                    const Matrix decoded = scratch(memory.pre);
                    decode_rows(pre, block.rows, num_up, decoded);
                    pre = {decoded};
                }
                activate(layer_.activation, rows, nullptr, pre.matrix, {nullptr, Type::float32}, hidden);
            }
        }
        if (need_down_weight || gradients.down_bias != nullptr) {
            const Tokens grad_out{tokens(grad_y), memory.tokens, factor};
            multiply(outer(block, d_model, need_down_weight ? d_ff : 0, grad_out,
                           need_down_weight ? Tokens{hidden, nullptr, nullptr} : grad_out),
                     memory.workspace, beta, gradients.down_weight, gradients.down_bias);
        }
        if (need_up) {
            const Tokens grad{grad_pre, nullptr, nullptr};
            const bool weight = gradients.up_weight.at != nullptr;
            multiply(outer(block, num_up, weight ? d_model : 0, grad, weight ? x : grad), memory.workspace, beta,
                     gradients.up_weight, gradients.up_bias);
        }
        if (gradients.x != nullptr)
            multiply(times(block, num_up, d_model, {grad_pre, nullptr, nullptr}, up_weight, false),
                     memory.workspace, nullptr,
                     scatter_to_rows(d_model, nullptr, nullptr, memory.choices, tokens(gradients.x)));
        beta = 1;
    }
}

}  // namespace ewa
