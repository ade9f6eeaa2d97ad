// What the layer does on a CPU besides matrix products: moving rows, activations, dropout.
//
// Knows nothing of torch: addresses of dense row-major memory, and sizes in elements. Nothing is checked here;
// ewa_kernels/kernels/blocked/cpp_rows.py does that. All is computed in float32, and no result depends on the number of threads.
#pragma once

#include <cstdint>
#include <functional>

#include "codec.h"
#include "matrix.h"

namespace ewa {

enum class Activation { gelu, gelu_tanh, quick_gelu, relu, relu2, silu, identity };

// What is done to row `row` of a matrix, which is row i of a block, and expert e's. Called by several threads at a time.
using RowFunction = std::function<void(int64_t e, int64_t i, Matrix matrix, int64_t row)>;

// to = (from + bias) * factor; bias may be null, `to` may be `from`.
void affine_row(int64_t n, const float* from, const float* bias, float factor, float* to);

// out[i] = row, d elements.
RowFunction store_rows(int64_t d, Matrix out);

// out[i] = in[tokens[i]], rows of d elements.
void gather_rows(Matrix in, const int64_t* tokens, int64_t n, int64_t d, Matrix out);

// out[tokens[i]] = (in[i] + bias[i / rows_per_expert]) * factor[i]; bias [experts, d] or null, factor [n] or null,
// tokens [n] or null: in order.
void scatter_rows(Matrix in, const float* bias, const float* factor, const int64_t* tokens, int64_t n,
                  int64_t rows_per_expert, int64_t d, Matrix out);
RowFunction scatter_to_rows(int64_t d, const float* bias, const float* factor, const int64_t* tokens, Matrix out);

// A block of n rows, rows_per_expert of each expert in turn.
struct Block {
    int64_t n;
    int64_t rows_per_expert;
    int64_t d_ff;
    bool gated;  // pre and grad_pre have 2·d_ff columns, gate first
    // Of dropout; specified by ewa_kernels/reference.py. `rows` [n] are grouped rows, and not read if dropout_p is 0.
    const int64_t* rows;
    uint64_t seed;
    double dropout_p;

    int64_t columns() const { return gated ? 2 * d_ff : d_ff; }
};

// pre = product + bias[expert]; hidden = dropout(act(pre)), or of act(gate) * value. bias [experts, columns] or null; pre
// may be null, or product itself; hidden may be null.
void activate(Activation activation, const Block& block, const float* bias, Matrix product, Matrix pre, Matrix hidden);
RowFunction activate_rows(Activation activation, const Block& block, const float* bias, Kept pre, Matrix hidden);

// From grad_hidden [n, d_ff], times factor [n] if that is not null: grad_pre, which with neither a factor nor a gate may
// be grad_hidden itself, hidden once more, and if it is not null, grad_factor [n] = grad_hidden · hidden, row by row.
void activate_backward(Activation activation, const Block& block, Matrix pre, Matrix grad_hidden, const float* factor,
                       Matrix grad_pre, Matrix hidden, float* grad_factor);
RowFunction activate_backward_rows(Activation activation, const Block& block, Kept pre, const float* factor,
                                   Matrix grad_pre, Matrix hidden, float* grad_factor);

}  // namespace ewa
