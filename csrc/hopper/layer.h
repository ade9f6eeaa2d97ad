// The layer's products on Hopper: what is launched. Knows neither CUDA's headers nor torch.
//
// Rows are by slot, see groups.cuh: where groups are equal, of each expert as many as the largest group has, ⌈R/E⌉;
// where they are given, of each as many blocks of 64 as it needs. x and gradients must hold zeros in slots that have no
// row, which `gather` writes.
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

struct Output {
    void* data = nullptr;
    int type = none;
};

// A number, or where it is.
struct Seed {
    uint64_t value = 0;
    const void* at = nullptr;  // uint64
};

struct Dropout {
    Seed seed;
    uint32_t threshold = 0;  // random bits below it drop; 0: none do
    float scale = 1.0f;
};

// Where kernels are launched.
struct Where {
    int device = 0;
    int multiprocessors = 132;  // that may be used
    void* stream = nullptr;
    bool overlaps = true;  // a kernel begins while the one before it ends, and waits for it then
};

// What calls of one kind have in common, and then what each has of its own.
struct Layer {
    bool is_bfloat16 = true;  // else float16
    int num_rows = 0, num_experts = 0, d_model = 0, d_ff = 0;
    int top_k = 1;          // choices of each token: num_rows = T · top_k
    bool is_given = false;  // whether groups are
    Activation activation = Activation::gelu;
    bool gated = false;
    uint32_t radix_a = 1, radix_b = 1, rounds = 0;  // of the permutation that is dealt, see deal.cuh
    uint32_t dropout_threshold = 0;
    float dropout_scale = 1.0f;

    Seed seed;                       // of the deal, and of dropout
    const int32_t* table = nullptr;  // where groups are given: what `tabulate` wrote
    Where where;

    int num_up() const { return gated ? 2 * d_ff : d_ff; }
    int slots() const;           // of all experts
    int64_t table_size() const;  // int32
    int num_flags() const;       // uint32
    Dropout dropout() const { return {seed, dropout_threshold, dropout_scale}; }
};

// Where a product's rows are: by slot; or by token, each loaded where it is needed.
struct Rows {
    const void* data = nullptr;
    bool by_token = false;
    const int32_t* permutation = nullptr;  // [R], of choices; null: it is dealt
    int32_t* dealt = nullptr;              // [R]: where the permutation goes, if it is dealt
};

// What a product reads and writes; the others are null. Weights are the layer's: up_weight [E, F or 2F, D], down_weight
// [E, D, F].
struct Operands {
    Rows rows;
    const void* a = nullptr;  // by slot
    const void* b = nullptr;
    Bias bias;
    const int32_t* permutation = nullptr;    // [R], of choices
    const float* routing_weights = nullptr;  // [R], by choice
    float* partial_routing = nullptr;        // [⌈F/64⌉, R], by row: parts of their gradients, summed up over F
    void* pre_activation = nullptr;          // [slots, F or 2F]
    void* hidden = nullptr;                  // [slots, F]
    Output out;                              // of the operands' type, but for grad_weight
    // Of grad_weight:
    int size_m = 0, size_n = 0;
    int splits = 1;              // see `splits_of`
    float* parts = nullptr;      // [E, splits, M, N] to work in, if there is more than one split
    float* part_sums = nullptr;  // [E, splits, M] to work in, or null: no sums are wanted
    Output sums;                 // [E, M]
};

// Parts of the sum over rows that different tiles make for a gradient [M, N]; it depends on sizes alone.
int splits_of(const Layer& layer, int size_m, int size_n);

enum class Call {
    up,           // hidden = activation(rows · bᵀ + bias), of what becomes pre_activation unless that is null
    down,         // out [R, D] at permutation[row] = (a [F] · bᵀ + bias) · routing weight
    grad_pre,     // out = grad_pre [F or 2F], and hidden, from a [D] · b, b being down_weight, and pre_activation
    grad_x,       // out [R, D] at permutation[row] = a [F or 2F] · b, b being up_weight
    grad_weight,  // out [E, M, N] = aᵀ b, a [M] and b [N] by slot, and sums = a summed over rows
};

// Rows by slot [slots, D], each null if it is not wanted.
struct Gathered {
    void* x = nullptr;
    const void* grad_y = nullptr;  // [T, D], of which the two that follow are made
    void* of_grad_y = nullptr;
    void* weighted = nullptr;  // times routing weights
    const float* routing_weights = nullptr;
};

// All return what went wrong, before anything was launched if it could be seen before, or nothing.
std::string run(Call call, const Layer& layer, const Operands& operands);
// Call::up, of rows by token, and Call::down of what it makes, in one launch. flags [num_flags]: 0, before and after.
std::string forward(const Layer& layer, const Operands& up, const Operands& down, uint32_t* flags);
std::string gather(const Layer& layer, const Rows& rows, const Gathered& gathered);
// table [table_size] from offsets [E + 1], whatever these are.
std::string tabulate(const Layer& layer, const int32_t* expert_offsets, int32_t* table);

}  // namespace ewa::hopper
