#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "activations.h"
#include "avx512.h"
#include "random.h"

namespace ewa {

namespace {

#ifdef EWA_AVX512
// An instruction for 16 numbers; the loops below take a dozen.
EWA_AVX512 void widen_halves(int64_t n, const uint16_t* from, float* to) {
    for (int64_t j = 0; j < n; j += lanes) {
        const __mmask16 mask = first_lanes(n - j);
        _mm512_mask_storeu_ps(to + j, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from + j)));
    }
}
EWA_AVX512 void narrow_to_halves(int64_t n, const float* from, uint16_t* to) {
    for (int64_t j = 0; j < n; j += lanes) {
        const __mmask16 mask = first_lanes(n - j);
        const __m256i halves = _mm512_cvtps_ph(_mm512_maskz_loadu_ps(mask, from + j), _MM_FROUND_TO_NEAREST_INT);
        _mm256_mask_storeu_epi16(to + j, mask, halves);
    }
}
const bool halves_at_once = have_avx512();
#else
void widen_halves(int64_t, const uint16_t*, float*) {}
void narrow_to_halves(int64_t, const float*, uint16_t*) {}
constexpr bool halves_at_once = false;
#endif

}  // namespace

// Each of these rows has a function of its own: a loop inside an OpenMP region cannot be cloned per processor.
EWA_CLONES void widen_row(Type type, int64_t n, const uint16_t* __restrict__ from, float* __restrict__ to) {
    if (type == Type::bfloat16) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) to[j] = widen(BFloat16{from[j]});
    } else if (halves_at_once) {
        widen_halves(n, from, to);
    } else {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) to[j] = widen(Half{from[j]});
    }
}

EWA_CLONES void affine_row(int64_t n, const float* from, const float* bias, float factor, float* to) {
    if (bias == nullptr) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) to[j] = from[j] * factor;
    } else {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) to[j] = (from[j] + bias[j]) * factor;
    }
}

EWA_CLONES void narrow_row(Type type, int64_t n, const float* __restrict__ from, uint16_t* __restrict__ to) {
    if (type == Type::bfloat16) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) to[j] = nearest<BFloat16>(from[j]).bits;
    } else if (halves_at_once) {
        narrow_to_halves(n, from, to);
    } else {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) to[j] = nearest<Half>(from[j]).bits;
    }
}

EWA_CLONES void saturate_row(int64_t n, float* row) {
    // By their bits, which compilers vectorise; they do not vectorise comparisons that a NaN must fail.
    constexpr uint32_t largest = 0x477FE000, infinity = 0x7F800000;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
        uint32_t bits;
        std::memcpy(&bits, row + j, sizeof bits);
        const uint32_t magnitude = bits & 0x7FFFFFFF;
        bits = magnitude > largest && magnitude < infinity ? (bits & 0x80000000) | largest : bits;
        std::memcpy(row + j, &bits, sizeof bits);
    }
}

namespace {

template <class T>
T* elements(const Matrix& matrix, int64_t at) {
    return static_cast<T*>(matrix.at) + at;
}

}  // namespace

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

namespace {

// In an order that depends on the processor's vectors alone.
EWA_CLONES float dot_row(int64_t n, const float* a, const float* b) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += a[j] * b[j];
    return sum;
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

RowFunction store_rows(int64_t d, Matrix out) {
    return [=](int64_t, int64_t i, Matrix in, int64_t row) { convert(in, row * d, d, out, i * d); };
}

void gather_rows(Matrix in, const int64_t* tokens, int64_t n, int64_t d, Matrix out) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) convert(in, tokens[i] * d, d, out, i * d);
}

RowFunction scatter_to_rows(int64_t d, const float* bias, const float* factor, const int64_t* tokens, Matrix out) {
    return [=](int64_t e, int64_t i, Matrix in, int64_t row) {
        const int64_t start = (tokens == nullptr ? i : tokens[i]) * d;
        if (bias == nullptr && factor == nullptr) return convert(in, row * d, d, out, start);
        const float* add = bias == nullptr ? nullptr : bias + e * d;
        Chunk from, to;
        for (int64_t j = 0; j < d; j += chunk_columns) {
            const int64_t n = std::min(chunk_columns, d - j), at = start + j;
            affine_row(n, from.read(in, row * d + j, n), add == nullptr ? nullptr : add + j,
                       factor == nullptr ? 1.0f : factor[i], to.room(out, at));
            to.write(out, at, n);
        }
    };
}

void scatter_rows(Matrix in, const float* bias, const float* factor, const int64_t* tokens, int64_t n,
                  int64_t rows_per_expert, int64_t d, Matrix out) {
    const RowFunction row = scatter_to_rows(d, bias, factor, tokens, out);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) row(i / rows_per_expert, i, in, i);
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
EWA_ROWS(GeluBFloat16)
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
const Rows by_activation[] = {
    {forward_Gelu, backward_Gelu},
    {forward_GeluTanh, backward_GeluTanh},
    {forward_QuickGelu, backward_QuickGelu},
    {forward_Relu, backward_Relu},
    {forward_Relu2, backward_Relu2},
    {forward_Silu, backward_Silu},
    {forward_Identity, backward_Identity},
};

Rows rows_of(Activation activation, Type hidden) {
    if (activation == Activation::gelu && hidden == Type::bfloat16) return {forward_GeluBFloat16, backward_GeluBFloat16};
    return by_activation[static_cast<int>(activation)];
}

}  // namespace

RowFunction activate_rows(Activation activation, const Block& block, const float* bias, Kept pre, Matrix hidden) {
    const auto forward = rows_of(activation, hidden.type).forward;
    const Dropout dropout(block);
    return [=](int64_t e, int64_t i, Matrix product, int64_t row) {
        const bool in_place = pre.matrix.at != nullptr &&
                              pre.matrix.element(i * block.columns()) == product.element(row * block.columns());
        Chunk gate, value, scale, out;
        const float* of_expert = bias == nullptr ? nullptr : bias + e * block.columns();
        for (int64_t j = 0; j < block.d_ff; j += chunk_columns) {
            const int64_t n = std::min(chunk_columns, block.d_ff - j);
            const auto pre_activation = [&](Chunk& chunk, int64_t part) {
                const int64_t column = part * block.d_ff + j;
                const float* products = chunk.read(product, row * block.columns() + column, n);
                if (of_expert == nullptr && (in_place || !pre.is_there())) return products;
                const int64_t at = i * block.columns() + column;
                float* to = chunk.room(pre.matrix, at);
                affine_row(n, products, of_expert == nullptr ? nullptr : of_expert + column, 1.0f, to);
                // Backward would find an infinity where forward had none.
                if (pre.matrix.type == Type::float16) saturate_row(n, to);
                if (pre.format != nullptr)
                    encode(pre, i, block.columns(), part, j, n, to);
                else
                    chunk.write(pre.matrix, at, n);
                return const_cast<const float*>(to);
            };
            const float* gates = pre_activation(gate, 0);
            const float* values = block.gated ? pre_activation(value, 1) : nullptr;
            if (hidden.at == nullptr) continue;
            forward(n, gates, values, dropout.scale(i, j, n, scale), out.room(hidden, i * block.d_ff + j));
            out.write(hidden, i * block.d_ff + j, n);
        }
    };
}

void activate(Activation activation, const Block& block, const float* bias, Matrix product, Matrix pre, Matrix hidden) {
    const RowFunction row = activate_rows(activation, block, bias, {pre}, hidden);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < block.n; ++i) row(i / block.rows_per_expert, i, product, i);
}

RowFunction activate_backward_rows(Activation activation, const Block& block, Kept pre, const float* factor,
                                   Matrix grad_pre, Matrix hidden, float* grad_factor) {
    const auto backward = rows_of(activation, hidden.type).backward;
    const Dropout dropout(block);
    return [=](int64_t, int64_t i, Matrix grad_hidden, int64_t row) {
        Chunk gate, value, scale, upstream, grad_gate, grad_value, out;
        float dot = 0;
        for (int64_t j = 0; j < block.d_ff; j += chunk_columns) {
            const int64_t n = std::min(chunk_columns, block.d_ff - j), at = i * block.d_ff + j;
            const int64_t gate_at = i * block.columns() + j, value_at = gate_at + block.d_ff;
            const auto pre_activation = [&](Chunk& chunk, int64_t part) {
                if (pre.format == nullptr) return chunk.read(pre.matrix, gate_at + part * block.d_ff, n);
                decode(pre, i, block.columns(), part, j, n, chunk.memory);
                if (pre.matrix.type == Type::float16) saturate_row(n, chunk.memory);
                return const_cast<const float*>(chunk.memory);
            };
            BackwardRow of{};
            of.factor = factor == nullptr ? 1.0f : factor[i];
            of.gate = pre_activation(gate, 0);
            of.grad_hidden = upstream.read(grad_hidden, row * block.d_ff + j, n);
            of.scale = dropout.scale(i, j, n, scale);
            of.grad_gate = grad_gate.room(grad_pre, gate_at);
            of.hidden = out.room(hidden, at);
            if (block.gated) {
                of.value = pre_activation(value, 1);
                of.grad_value = grad_value.room(grad_pre, value_at);
            }
            backward(n, of);
            if (grad_factor != nullptr) dot += dot_row(n, of.grad_hidden, of.hidden);
            out.write(hidden, at, n);
            grad_gate.write(grad_pre, gate_at, n);
            if (block.gated) grad_value.write(grad_pre, value_at, n);
        }
        if (grad_factor != nullptr) grad_factor[i] = dot;
    };
}

void activate_backward(Activation activation, const Block& block, Matrix pre, Matrix grad_hidden, const float* factor,
                       Matrix grad_pre, Matrix hidden, float* grad_factor) {
    const RowFunction row = activate_backward_rows(activation, block, {pre}, factor, grad_pre, hidden, grad_factor);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < block.n; ++i) row(i / block.rows_per_expert, i, grad_hidden, i);
}

}  // namespace ewa
