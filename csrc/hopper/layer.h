// The layer's products on Hopper: what is launched. Knows neither CUDA's headers nor torch.
//
// Rows are by slot: of each expert as many as the largest group has, ⌈R/E⌉; the last of a smaller group holds what the
// group's last row holds, or zeros.
#pragma once

#include <cstdint>
#include <string>

namespace ewa::hopper {

enum class Activation { gelu, gelu_tanh, quick_gelu, silu, relu, relu2, identity };

struct Bias {
    enum Type { none, float32, bfloat16, float16 };
    const void* data = nullptr;
    int type = none;
};

struct Layer {
    bool is_bfloat16 = true;  // else float16
    int num_rows = 0, num_experts = 0, d_model = 0, d_ff = 0;
    Activation activation = Activation::gelu;
    bool gated = false;
    uint64_t seed = 0;          // of dropout
    uint32_t threshold = 0;     // random bits below it drop; 0: none do
    float scale = 1.0f;
    int multiprocessors = 132;  // that may be used
    void* stream = nullptr;

    int slots() const { return (num_rows + num_experts - 1) / num_experts; }  // of an expert
};

// hidden [E, slots, F] and, unless null, pre_activation [E, slots, F or 2F] = x [E, slots, D] · up_weightᵀ
// [E, F or 2F, D] + bias. Returns what went wrong, or nothing.
std::string up_projection(const Layer& layer, const void* x, const void* up_weight, Bias bias, void* hidden,
                          void* pre_activation);

// y [R, D] at permutation[row] = hidden [E, slots, F] · down_weightᵀ [E, D, F] + bias.
std::string down_projection(const Layer& layer, const void* hidden, const void* down_weight, Bias bias,
                            const int32_t* permutation, void* y);

}  // namespace ewa::hopper
