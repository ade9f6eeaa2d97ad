#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "activations.h"
#include "random.h"

namespace ewa {
namespace {

// Each of these rows has a function of its own: a loop inside an OpenMP region cannot be cloned per processor.
EWA_CLONES void widen_row(Type type, int64_t n, const uint16_t* __restrict__ from, float* __restrict__ to) {
    if (type == Type::bfloat16) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) to[j] = widen(BFloat16{from[j]});
    } else {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) to[j] = widen(Half{from[j]});
    }
}

EWA_CLONES void narrow_row(Type type, int64_t n, const float* __restrict__ from, uint16_t* __restrict__ to) {
    if (type == Type::bfloat16) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) to[j] = nearest<BFloat16>(from[j]).bits;
    } else {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) to[j] = nearest<Half>(from[j]).bits;
    }
}

EWA_CLONES void add_row(int64_t n, const float* row, float* sum) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) sum[j] += row[j];
}

// In an order that depends on the processor's vectors alone.
EWA_CLONES float dot_row(int64_t n, const float* a, const float* b) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += a[j] * b[j];
    return sum;
}

// to = (from + bias) * factor; bias may be null, `to` may be `from`.
EWA_CLONES void affine_row(int64_t n, const float* from, const float* bias, float factor, float* to) {
    if (bias == nullptr) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) to[j] = from[j] * factor;
    } else {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) to[j] = (from[j] + bias[j]) * factor;
    }
}

// What is finite stays so in float16, which ends at 65,504.
EWA_CLONES void saturate_row(int64_t n, float* row) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
        const float nearest = std::min(std::max(row[j], -65504.0f), 65504.0f);
        row[j] = std::fabs(row[j]) < INFINITY ? nearest : row[j];
    }
}

template <class T>
T* elements(const Matrix& matrix, int64_t at) {
    return static_cast<T*>(matrix.at) + at;
}

// n elements, rounded if `out` is narrower. One of the two is float32, or both are of one type.
void convert(const Matrix& in, int64_t from, int64_t n, const Matrix& out, int64_t to) {
    if (in.type == out.type && in.type == Type::float32)
        std::memcpy(elements<float>(out, to), elements<float>(in, from), n * sizeof(float));
    else if (in.type == out.type)
        std::memcpy(elements<uint16_t>(out, to), elements<uint16_t>(in, from), n * sizeof(uint16_t));
    else if (out.type == Type::float32)
        widen_row(in.type, n, elements<uint16_t>(in, from), elements<float>(out, to));
    else
        narrow_row(out.type, n, elements<float>(in, from), elements<uint16_t>(out, to));
}

// Columns of a row that are computed at a time, so that what is widened for it stays in the first cache.
constexpr int64_t chunk_columns = 512;

// Some columns of a matrix as floats: in place if they are floats, or else in the memory that comes along.
struct Chunk {
    float memory[chunk_columns];

    const float* read(const Matrix& matrix, int64_t at, int64_t n) {
        if (matrix.type == Type::float32) return elements<float>(matrix, at);
        widen_row(matrix.type, n, elements<uint16_t>(matrix, at), memory);
        return memory;
    }
    // Where to compute what `write` then makes an end of. A matrix that is null is not written.
    float* room(const Matrix& matrix, int64_t at) {
        return matrix.at != nullptr && matrix.type == Type::float32 ? elements<float>(matrix, at) : memory;
    }
    void write(const Matrix& matrix, int64_t at, int64_t n) const {
        if (matrix.at != nullptr && matrix.type != Type::float32)
            narrow_row(matrix.type, n, memory, elements<uint16_t>(matrix, at));
    }
};

}  // namespace

void gather_rows(Matrix in, const int64_t* tokens, int64_t n, int64_t d, Matrix out) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) convert(in, tokens[i] * d, d, out, i * d);
}

void scatter_rows(Matrix in, const float* bias, const float* factor, const int64_t* tokens, int64_t n,
                  int64_t rows_per_expert, int64_t d, Matrix out) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        if (bias == nullptr && factor == nullptr) {
            convert(in, i * d, d, out, tokens[i] * d);
            continue;
        }
        const float* add = bias == nullptr ? nullptr : bias + i / rows_per_expert * d;
        Chunk from, to;
        for (int64_t j = 0; j < d; j += chunk_columns) {
            const int64_t n_columns = std::min(chunk_columns, d - j), at = tokens[i] * d + j;
            affine_row(n_columns, from.read(in, i * d + j, n_columns), add == nullptr ? nullptr : add + j,
                       factor == nullptr ? 1.0f : factor[i], to.room(out, at));
            to.write(out, at, n_columns);
        }
    }
}

namespace {

EWA_CLONES void dropout_row(int64_t n, uint32_t of_row, const uint32_t* of_columns, uint32_t threshold, float kept,
                            float* scale) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) scale[j] = dropout_bits(of_row, of_columns[j]) < threshold ? 0.0f : kept;
}

// What `hidden` is multiplied by.
class Dropout {
   public:
    explicit Dropout(const Block& block) : rows_(block.rows), keys_(block.seed) {
        if (block.dropout_p <= 0) return;
        of_columns_.resize(block.d_ff);
        for (int64_t j = 0; j < block.d_ff; ++j) of_columns_[j] = keys_.of_column(j);
        const double threshold = std::nearbyint(block.dropout_p * 0x1p32);
        threshold_ = static_cast<uint32_t>(std::min(threshold, 0x1p32 - 1));
        kept_ = threshold < 0x1p32 ? static_cast<float>(1 / (1 - block.dropout_p)) : 0.0f;
    }
    // For columns j … j + n − 1 of row i of the block; null without dropout.
    const float* scale(int64_t i, int64_t j, int64_t n, Chunk& chunk) const {
        if (of_columns_.empty()) return nullptr;
        dropout_row(n, keys_.of_row(rows_[i]), of_columns_.data() + j, threshold_, kept_, chunk.memory);
        return chunk.memory;
    }

   private:
    const int64_t* rows_;
    DropoutKeys keys_;
    std::vector<uint32_t> of_columns_;
    uint32_t threshold_ = 0;
    float kept_ = 1;
};

// Columns of one row. `value`: what a gate multiplies, or null; `scale`: of dropout, or null.
template <class Act>
EWA_INLINE void activate_row(int64_t n, const float* gate, const float* value, const float* scale, float* hidden) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) hidden[j] = Act::at(gate[j]).value;
    if (value != nullptr)
        for (int64_t j = 0; j < n; ++j) hidden[j] *= value[j];
    if (scale != nullptr)
        for (int64_t j = 0; j < n; ++j) hidden[j] *= scale[j];
}

struct BackwardRow {
    float factor;  // of grad_hidden
    const float *gate, *value, *scale, *grad_hidden;
    float *grad_gate, *grad_value, *hidden;
};

// What is known when it is compiled is not in the loop: with it there the loop would not be vectorised.
template <class Act, bool gated, bool scaled>
EWA_INLINE void activate_backward_row(int64_t n, const BackwardRow& row) {
    const BackwardRow of = row;  // of its own, so that no store may change an address
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
        const ValueAndSlope act = Act::at(of.gate[j]);
        float grad = of.grad_hidden[j] * of.factor;
        float result = act.value;
        if constexpr (scaled) grad *= of.scale[j];
        if constexpr (gated) {
            of.grad_value[j] = grad * act.value;
            grad *= of.value[j];
            result *= of.value[j];
        }
        if constexpr (scaled) result *= of.scale[j];
        of.hidden[j] = result;
        of.grad_gate[j] = grad * act.slope;
    }
}

#define EWA_ROWS(Act)                                                                                                  \
    EWA_CLONES void forward_##Act(int64_t n, const float* gate, const float* value, const float* scale, float* hidden) { \
        activate_row<Act>(n, gate, value, scale, hidden);                                                              \
    }                                                                                                                  \
    EWA_CLONES void backward_##Act(int64_t n, const BackwardRow& row) {                                                \
        if (row.value != nullptr && row.scale != nullptr)                                                              \
            activate_backward_row<Act, true, true>(n, row);                                                            \
        else if (row.value != nullptr)                                                                                 \
            activate_backward_row<Act, true, false>(n, row);                                                           \
        else if (row.scale != nullptr)                                                                                 \
            activate_backward_row<Act, false, true>(n, row);                                                           \
        else                                                                                                           \
            activate_backward_row<Act, false, false>(n, row);                                                          \
    }
EWA_ROWS(Gelu)
EWA_ROWS(GeluTanh)
EWA_ROWS(QuickGelu)
EWA_ROWS(Relu)
EWA_ROWS(Relu2)
EWA_ROWS(Silu)
EWA_ROWS(Identity)
#undef EWA_ROWS

struct Rows {
    void (*forward)(int64_t, const float*, const float*, const float*, float*);
    void (*backward)(int64_t, const BackwardRow&);
};

// In the order of `Activation`.
const Rows rows_of[] = {
    {forward_Gelu, backward_Gelu},
    {forward_GeluTanh, backward_GeluTanh},
    {forward_QuickGelu, backward_QuickGelu},
    {forward_Relu, backward_Relu},
    {forward_Relu2, backward_Relu2},
    {forward_Silu, backward_Silu},
    {forward_Identity, backward_Identity},
};

}  // namespace

void activate(Activation activation, const Block& block, const float* bias, Matrix product, Matrix pre, Matrix hidden) {
    const auto forward = rows_of[static_cast<int>(activation)].forward;
    const bool keeps_product = pre.at == product.at || pre.at == nullptr;
    const Dropout dropout(block);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < block.n; ++i) {
        Chunk gate, value, scale, out;
        const float* of_expert = bias == nullptr ? nullptr : bias + i / block.rows_per_expert * block.columns();
        for (int64_t j = 0; j < block.d_ff; j += chunk_columns) {
            const int64_t n = std::min(chunk_columns, block.d_ff - j);
            const auto pre_activation = [&](Chunk& chunk, int64_t column) {
                const int64_t from = i * block.columns() + column;
                const float* products = chunk.read(product, from, n);
                if (of_expert == nullptr && keeps_product) return products;
                float* to = chunk.room(pre, from);
                affine_row(n, products, of_expert == nullptr ? nullptr : of_expert + column, 1.0f, to);
                // Backward would find an infinity where forward had none.
                if (pre.type == Type::float16) saturate_row(n, to);
                chunk.write(pre, from, n);
                return const_cast<const float*>(to);
            };
            const float* gates = pre_activation(gate, j);
            const float* values = block.gated ? pre_activation(value, block.d_ff + j) : nullptr;
            forward(n, gates, values, dropout.scale(i, j, n, scale), out.room(hidden, i * block.d_ff + j));
            out.write(hidden, i * block.d_ff + j, n);
        }
    }
}

void activate_backward(Activation activation, const Block& block, Matrix pre, Matrix grad_hidden, const float* factor,
                       Matrix grad_pre, Matrix hidden, float* grad_factor, float* grad_bias, float beta) {
    const int64_t columns = block.columns();
    const auto backward = rows_of[static_cast<int>(activation)].backward;
    const Dropout dropout(block);
    // Each chunk of an expert's rows has a sum of its own, so that the order of additions is always the same.
    constexpr int64_t summed_rows = 64;
    const int64_t experts = block.n / block.rows_per_expert;
    const int64_t sums_per_expert = (block.rows_per_expert + summed_rows - 1) / summed_rows;
    std::vector<float> sums(grad_bias == nullptr ? 0 : experts * sums_per_expert * columns);

    const auto row = [&](int64_t i, float* sum) {
        Chunk gate, value, scale, upstream, grad_gate, grad_value, out;
        float dot = 0;
        for (int64_t j = 0; j < block.d_ff; j += chunk_columns) {
            const int64_t n = std::min(chunk_columns, block.d_ff - j);
            const int64_t at = i * block.d_ff + j, gate_at = i * columns + j, value_at = gate_at + block.d_ff;
            BackwardRow of{};
            of.factor = factor == nullptr ? 1.0f : factor[i];
            of.gate = gate.read(pre, gate_at, n);
            of.grad_hidden = upstream.read(grad_hidden, at, n);
            of.scale = dropout.scale(i, j, n, scale);
            of.grad_gate = grad_gate.room(grad_pre, gate_at);
            of.hidden = out.room(hidden, at);
            if (block.gated) {
                of.value = value.read(pre, value_at, n);
                of.grad_value = grad_value.room(grad_pre, value_at);
            }
            backward(n, of);
            if (grad_factor != nullptr) dot += dot_row(n, of.grad_hidden, of.hidden);
            out.write(hidden, at, n);
            grad_gate.write(grad_pre, gate_at, n);
            if (block.gated) grad_value.write(grad_pre, value_at, n);
            if (sum == nullptr) continue;
            add_row(n, of.grad_gate, sum + j);
            if (block.gated) add_row(n, of.grad_value, sum + block.d_ff + j);
        }
        if (grad_factor != nullptr) grad_factor[i] = dot;
    };
#pragma omp parallel for schedule(static)
    for (int64_t s = 0; s < experts * sums_per_expert; ++s) {
        const int64_t end = (s / sums_per_expert + 1) * block.rows_per_expert;
        const int64_t first = end - block.rows_per_expert + s % sums_per_expert * summed_rows;
        for (int64_t i = first; i < std::min(first + summed_rows, end); ++i)
            row(i, grad_bias == nullptr ? nullptr : sums.data() + s * columns);
    }
    if (grad_bias == nullptr) return;
    for (int64_t e = 0; e < experts; ++e) {
        float* total = grad_bias + e * columns;
        for (int64_t j = 0; j < columns; ++j) total[j] = beta == 0.0f ? 0.0f : beta * total[j];
        for (int64_t s = e * sums_per_expert; s < (e + 1) * sums_per_expert; ++s)
            add_row(columns, sums.data() + s * columns, total);
    }
}

}  // namespace ewa
