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
    allocate(nullptr);
}

std::vector<std::vector<int64_t>> LayerPass::counts() const {
    std::vector<std::vector<int64_t>> counts;
    for (const RowBlock& block : blocks_) counts.push_back(block.counts);
    return counts;
}

// Where each part of the memory is, and how much there is of it.
void LayerPass::allocate(char* memory) {
    const int64_t size = layer_.bfloat16 ? 2 : 4, rows = most_rows_;
    bytes_ = 0;
    const auto take = [&](auto*& to, int64_t bytes) {
        to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(memory + bytes_);
        bytes_ += (bytes + alignment - 1) / alignment * alignment;
    };
    take(rows_, rows * 8);
    take(choices_, rows * 8);
    take(tokens_, rows * 8);
    take(factor_, rows * 4);
    take(grad_factor_, rows * 4);
    take(up_bias_, layer_.num_experts * layer_.num_up() * 4);
    take(down_bias_, layer_.num_experts * layer_.d_model * 4);
    take(hidden_, rows * layer_.d_ff * size);
    take(pre_, backward_ ? rows * layer_.num_up() * size : 0);
    take(grad_pre_, backward_ ? rows * layer_.num_up() * size : 0);
    take(workspace_, workspace_floats_ * 4);
}

void LayerPass::widen_biases(const Inputs& inputs) {
    const auto floats = [](const void* bias, Type type, int64_t n, float* to) -> const float* {
        if (bias == nullptr || type == Type::float32) return static_cast<const float*>(bias);
        widen_row(type, n, static_cast<const uint16_t*>(bias), to);
        return to;
    };
    up_bias = floats(inputs.up_bias, layer_.up_bias, layer_.num_experts * layer_.num_up(), up_bias_);
    down_bias = floats(inputs.down_bias, layer_.down_bias, layer_.num_experts * layer_.d_model, down_bias_);
}

// Which grouped rows, choices and tokens a block's rows are, and what they are weighted with.
void LayerPass::look_up(const RowBlock& block, const Inputs& inputs) {
    int64_t i = 0;
    for (size_t e = 0; e < block.counts.size(); ++e)
        for (int64_t row = block.first[e]; row < block.first[e] + block.counts[e]; ++row, ++i) {
            const int64_t choice = inputs.permutation[row];
            rows_[i] = row;
            choices_[i] = choice;
            tokens_[i] = choice / layer_.top_k;
            if (inputs.routing_weights != nullptr) factor_[i] = inputs.routing_weights[choice];
        }
}

Block LayerPass::rows_of(const RowBlock& block, const Inputs& inputs) const {
    return {block.rows, 1, layer_.d_ff, layer_.gated, rows_, inputs.seed, layer_.dropout_p};
}

TimesWeights LayerPass::times(const RowBlock& block, int64_t k, int64_t n, Tokens tokens, Matrix weights,
                         bool transposed) const {
    return {Groups(block.counts), k, n, tokens, {weights, transposed}, layer_.bfloat16};
}

Outer LayerPass::outer(const RowBlock& block, int64_t m, int64_t n, Tokens left, Tokens right) const {
    return {Groups(block.counts), m, n, left, right, layer_.bfloat16};
}

void LayerPass::forward(const Inputs& inputs, bool deal, void* y, char* memory) {
    allocate(memory);
    if (deal) random_permutation(layer_.num_tokens, inputs.seed, inputs.permutation);
    widen_biases(inputs);
    const int64_t d_model = layer_.d_model, d_ff = layer_.d_ff, num_up = layer_.num_up();
    for (const RowBlock& block : blocks_) {
        look_up(block, inputs);
        const Matrix hidden = scratch(hidden_);
        Matrix pre = tokens(nullptr);
        if (inputs.pre_activation != nullptr)
            pre.at = const_cast<char*>(tokens(inputs.pre_activation).element(block.saved * num_up));
        multiply(times(block, d_model, num_up, {tokens(inputs.x), tokens_, nullptr},
                       {inputs.up_weight, layer_.up_weight}, true),
                 workspace_, pre.type == Type::float32 ? static_cast<float*>(pre.at) : nullptr,
                 activate_rows(layer_.activation, rows_of(block, inputs), up_bias, pre, hidden));
        multiply(times(block, d_ff, d_model, {hidden, nullptr, nullptr}, {inputs.down_weight, layer_.down_weight}, true),
                 workspace_, nullptr,
                 scatter_to_rows(d_model, down_bias, inputs.routing_weights == nullptr ? nullptr : factor_, choices_,
                                 tokens(y)));
    }
}

void LayerPass::backward(const Inputs& inputs, const void* grad_y, const Gradients& gradients, char* memory) {
    allocate(memory);
    widen_biases(inputs);
    const int64_t d_model = layer_.d_model, d_ff = layer_.d_ff, num_up = layer_.num_up();
    const bool need_up = gradients.up_weight.at != nullptr || gradients.up_bias != nullptr;
    const bool need_pre = need_up || gradients.x != nullptr || gradients.routing_weights != nullptr;
    const bool need_down_weight = gradients.down_weight.at != nullptr;
    const Matrix hidden = scratch(hidden_), grad_pre = scratch(grad_pre_);
    const Matrix up_weight{inputs.up_weight, layer_.up_weight}, down_weight{inputs.down_weight, layer_.down_weight};
    float beta = 0;  // the first block writes gradients of parameters, others add to them
    for (const RowBlock& block : blocks_) {
        look_up(block, inputs);
        const float* const factor = inputs.routing_weights == nullptr ? nullptr : factor_;
        const Tokens x{tokens(inputs.x), tokens_, nullptr};
        const Block rows = rows_of(block, inputs);
        if (need_pre || need_down_weight) {
            Matrix pre = scratch(pre_);
            if (inputs.pre_activation != nullptr) {
                pre = tokens(inputs.pre_activation);
                pre.at = const_cast<char*>(pre.element(block.saved * num_up));
            } else {
                multiply(times(block, d_model, num_up, x, up_weight, true), workspace_,
                         pre.type == Type::float32 ? static_cast<float*>(pre.at) : nullptr,
                         activate_rows(layer_.activation, rows, up_bias, pre, {nullptr, Type::float32}));
            }
            if (need_pre) {
                float* const grad_factor = gradients.routing_weights == nullptr ? nullptr : grad_factor_;
                multiply(times(block, d_model, d_ff, {tokens(grad_y), tokens_, nullptr}, down_weight, false), workspace_,
                         nullptr,
                         activate_backward_rows(layer_.activation, rows, pre, factor, grad_pre, hidden, grad_factor));
                for (int64_t i = 0; grad_factor != nullptr && i < block.rows; ++i)
                    gradients.routing_weights[choices_[i]] =
                        grad_factor[i] + (gradients.of_bias_factor == nullptr ? 0 : gradients.of_bias_factor[rows_[i]]);
            } else {
                activate(layer_.activation, rows, nullptr, pre, {nullptr, Type::float32}, hidden);
            }
        }
        if (need_down_weight || gradients.down_bias != nullptr) {
            const Tokens grad_out{tokens(grad_y), tokens_, factor};
            multiply(outer(block, d_model, need_down_weight ? d_ff : 0, grad_out,
                           need_down_weight ? Tokens{hidden, nullptr, nullptr} : grad_out),
                     workspace_, beta, gradients.down_weight, gradients.down_bias);
        }
        if (need_up) {
            const Tokens grad{grad_pre, nullptr, nullptr};
            const bool weight = gradients.up_weight.at != nullptr;
            multiply(outer(block, num_up, weight ? d_model : 0, grad, weight ? x : grad), workspace_, beta,
                     gradients.up_weight, gradients.up_bias);
        }
        if (gradients.x != nullptr)
            multiply(times(block, num_up, d_model, {grad_pre, nullptr, nullptr}, up_weight, false), workspace_, nullptr,
                     scatter_to_rows(d_model, nullptr, nullptr, choices_, tokens(gradients.x)));
        beta = 1;
    }
}

}  // namespace ewa
