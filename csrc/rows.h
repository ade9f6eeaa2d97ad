// What the layer does on a CPU besides matrix products: dealing tokens, moving rows, activations.
//
// Knows nothing of torch: float32 and int32 pointers to dense row-major memory, and sizes in elements. Nothing is
// checked here; ewa_kernels/kernels/cpp_rows.py does that. No result depends on the number of threads.
#pragma once

#include <cstdint>

namespace ewa {

enum class Activation { gelu, gelu_tanh, quick_gelu, relu, relu2, silu, identity };

// out[i] = the token of grouped row i; specified by ewa_kernels/reference.py.
void random_permutation(int64_t num_tokens, uint64_t seed, int32_t* out);

// out[i] = in[tokens[i]], rows of d elements.
void gather_rows(const float* in, const int64_t* tokens, int64_t n, int64_t d, float* out);

// out[tokens[i]] = in[i] + bias[i / rows_per_expert]; bias [experts, d] or null.
void scatter_rows(const float* in, const float* bias, const int64_t* tokens, int64_t n, int64_t rows_per_expert,
                  int64_t d, float* out);

// A block of n rows, rows_per_expert of each expert in turn.
struct Block {
    int64_t n;
    int64_t rows_per_expert;
    int64_t d_ff;
    bool gated;          // pre and grad_pre have 2·d_ff columns, gate first
    const float* scale;  // [n, d_ff], of dropout, or null
};

// pre += bias[expert]; hidden = act(pre) * scale, or act(gate) * value * scale. bias [experts, columns] or null.
void activate(Activation activation, const Block& block, const float* bias, float* pre, float* hidden);

// From grad_hidden [n, d_ff]: grad_pre, and hidden once more. grad_pre and grad_hidden must not overlap.
// grad_bias [experts, columns], if not null, becomes beta·grad_bias + the sum of grad_pre over each expert's rows.
void activate_backward(Activation activation, const Block& block, const float* pre, const float* grad_hidden,
                       float* grad_pre, float* hidden, float* grad_bias, float beta);

}  // namespace ewa
