// The layer's forward and backward on a CPU, with the matrix products of products.h.
//
// A block of grouped rows goes through both projections before the next one starts: what is between them is never kept
// for more than a block. Knows nothing of torch: addresses of dense row-major memory. Nothing is checked here;
// ewa_kernels/functional.py does that.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "products.h"

namespace ewa {

// What calls have in common. R = num_tokens · top_k grouped rows; `up` has 2·d_ff columns if gated.
struct Layer {
    int64_t num_tokens, top_k, num_experts, d_model, d_ff;
    Activation activation;
    bool gated;
    double dropout_p;
    Type tokens;    // of x, y, what is kept, and their gradients
    bool bfloat16;  // what is multiplied is rounded to; else float32. Hidden and its gradient are kept so too
    Type up_weight, up_bias, down_weight, down_bias;
    std::shared_ptr<const Format> format;  // of pre-activations that are kept; null: as they are

    int64_t num_rows() const { return num_tokens * top_k; }
    int64_t num_up() const { return gated ? 2 * d_ff : d_ff; }
};

// Grouped rows of all experts, first[e] … first[e] + counts[e] − 1 of expert e.
struct RowBlock {
    std::vector<int64_t> first, counts;
    int64_t rows, saved;  // how many, and how many blocks before have
};

// Tensors of a call; what there is none of is null.
struct Inputs {
    void *x, *up_weight, *up_bias, *down_weight, *down_bias;
    const float* routing_weights;  // [R], by choice
    uint64_t seed;
    int32_t* permutation;  // [R]
    void* pre_activation;  // [R, up's columns], in the order of blocks; in a format all codes, and then all scales
};

// Where gradients go. Those of weights may have a type of 16 bits if there is a single block; biases' are float32.
struct Gradients {
    void* x;  // [R, d_model], by choice
    Matrix up_weight, down_weight;
    float *up_bias, *down_bias;
    float* routing_weights;      // [R], by choice
    const float* of_bias_factor;  // [R], by grouped row: what the down bias adds to it; or null
};

// Forwards or backwards of one kind: how rows are cut into blocks, of all experts together about `block_rows` each, and
// how many bytes each needs to work in, aligned to 64. `expert_offsets` [num_experts + 1], or null: equal groups.
// Several may run at a time.
class LayerPass {
public:
    LayerPass(const Layer& layer, const int32_t* expert_offsets, int64_t block_rows, bool backward);

    int64_t num_blocks() const { return blocks_.size(); }
    std::vector<std::vector<int64_t>> counts() const;  // of each block, rows of each expert
    int64_t memory_bytes() const { return Memory(*this, nullptr).bytes; }

    // y [R, d_model], by choice. `deal`: the permutation is filled first. pre_activation is filled if there is one.
    void forward(const Inputs& inputs, bool deal, void* y, char* memory) const;
    // Without pre_activation it is computed again.
    void backward(const Inputs& inputs, const void* grad_y, const Gradients& gradients, char* memory) const;

private:
    // Parts of the memory. Of a block: its grouped rows, their choices and tokens, what they are weighted with, hidden
    // and so on; and biases as floats.
    struct Memory {
        int64_t *rows, *choices, *tokens;
        float *factor, *grad_factor;
        char *hidden, *pre, *grad_pre;
        float *up_bias, *down_bias, *workspace;
        int64_t bytes = 0;

        Memory(const LayerPass& pass, char* start);
        // Fills them for a block.
        void look_up(const LayerPass& pass, const RowBlock& block, const Inputs& inputs) const;
    };

    Block rows_of(const RowBlock& block, const Inputs& inputs, const Memory& memory) const;
    TimesWeights times(const RowBlock& block, int64_t k, int64_t n, Tokens tokens, Matrix weights,
                       bool transposed) const;
    Outer outer(const RowBlock& block, int64_t m, int64_t n, Tokens left, Tokens right) const;
    Matrix scratch(void* at) const { return {at, layer_.bfloat16 ? Type::bfloat16 : Type::float32}; }
    // pre_activation of a block: what is kept of it, or nothing.
    Kept kept(const RowBlock& block, const Inputs& inputs) const;
    Matrix tokens(const void* at) const { return {const_cast<void*>(at), layer_.tokens}; }

    Layer layer_;
    bool backward_;
    int64_t threads_ = max_threads();
    std::vector<RowBlock> blocks_;
    int64_t most_rows_ = 0, workspace_floats_ = 0;
};

}  // namespace ewa
