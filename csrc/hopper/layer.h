// The layer's products on Hopper: what is launched. Knows neither CUDA's headers nor torch.
//
// Rows are by slot: of each expert as many as the largest group has, ⌈R/E⌉. In the last of a smaller group is no row: x
// and gradients must hold zeros there, which those that are found by token do.
#pragma once

#include <cstdint>
#include <string>

namespace ewa::hopper {

enum class Activation { gelu, gelu_tanh, quick_gelu, silu, relu, relu2, identity };

enum NumberType { none, float32, bfloat16, float16 };

struct Bias {
    const void* data = nullptr;
    int type = none;  // a NumberType
};

struct Sums {
    void* data = nullptr;
    int type = none;
};

// Where a product's rows are: by slot; or by token, each loaded where it is needed.
struct Rows {
    const void* data = nullptr;
    bool by_token = false;
    const int32_t* permutation = nullptr;  // by token: [R], of choices; null: dealt, by what follows
    int top_k = 1;                         // R = T · top_k
    uint64_t seed = 0;
    uint32_t radix_a = 1, radix_b = 1, rounds = 0;
    int32_t* dealt = nullptr;  // [R]: where the permutation goes, if it is dealt
};

struct Dropout {
    uint64_t seed = 0;
    uint32_t threshold = 0;  // random bits below it drop; 0: none do
    float scale = 1.0f;
};

struct Layer {
    bool is_bfloat16 = true;  // else float16
    int num_rows = 0, num_experts = 0, d_model = 0, d_ff = 0;
    Activation activation = Activation::gelu;
    bool gated = false;
    Dropout dropout;
    int multiprocessors = 132;  // that may be used
    void* stream = nullptr;

    int slots() const { return (num_rows - 1) / num_experts + 1; }  // of an expert
};

// What a product reads and writes; the others are null. Weights are the layer's: up_weight [E, F or 2F, D], down_weight
// [E, D, F].
struct Operands {
    Rows rows;
    const void* a = nullptr;  // by slot
    const void* b = nullptr;
    Bias bias;
    const int32_t* permutation = nullptr;  // [R]
    void* pre_activation = nullptr;        // [E, slots, F or 2F]
    void* hidden = nullptr;                // [E, slots, F]
    void* out = nullptr;
    // Of grad_weight:
    int size_m = 0, size_n = 0;
    float* parts = nullptr;      // [E, splits, M, N] to work in, if there is more than one split, see `splits_of`
    float* part_sums = nullptr;  // [E, splits, M] to work in, or null: no sums are wanted
    Sums sums;                   // [E, M]
};

// Parts of the sum over rows that different tiles make for a gradient [M, N]; it depends on sizes alone.
int splits_of(const Layer& layer, int size_m, int size_n);

enum class Call {
    up,           // hidden = activation(rows · bᵀ + bias), of what becomes pre_activation unless that is null
    down,         // out [R, D] at permutation[row] = a [F] · bᵀ + bias
    grad_pre,     // out = grad_pre [F or 2F], and hidden, from a [D] · b, b being down_weight, and pre_activation
    grad_x,       // out [R, D] at permutation[row] = a [F or 2F] · b, b being up_weight
    grad_weight,  // out [E, M, N] = aᵀ b, a [M] and b [N] by slot, and sums = a summed over rows
};

// Returns what went wrong, before anything was launched if it could be seen before, or nothing.
std::string run(Call call, const Layer& layer, const Operands& operands);

}  // namespace ewa::hopper
