#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "activations.h"
#include "random.h"

namespace ewa {
namespace {

constexpr int max_rounds = 24;

}  // namespace

void random_permutation(int64_t num_tokens, uint64_t seed, int32_t* out) {
    if (num_tokens == 0) return;
    uint32_t keys[max_rounds + 4];
    for (int i = 0; i < max_rounds / 2 + 2; ++i) {
        const uint64_t word = seed_word(seed, i);
        keys[2 * i] = static_cast<uint32_t>(word);
        keys[2 * i + 1] = static_cast<uint32_t>(word >> 32);
    }
    const int rounds = num_tokens < 1024 ? max_rounds : 12;
    uint32_t a = static_cast<uint32_t>(std::sqrt(static_cast<double>(num_tokens)));
    while (static_cast<int64_t>(a) * a < num_tokens) ++a;
    while (a > 1 && static_cast<int64_t>(a - 1) * (a - 1) >= num_tokens) --a;
    const uint32_t b = static_cast<uint32_t>((num_tokens + a - 1) / a);

    // Only a + b values can enter a round function, so all of them are tabulated.
    std::vector<uint32_t> table(rounds / 2 * static_cast<size_t>(a + b));
    for (int i = 0; i < rounds; i += 2) {
        uint32_t* to_left = table.data() + i / 2 * static_cast<size_t>(a + b);
        for (uint32_t v = 0; v < b; ++v) to_left[v] = static_cast<uint64_t>(mix32(v ^ keys[i])) * a >> 32;
        for (uint32_t v = 0; v < a; ++v) to_left[b + v] = static_cast<uint64_t>(mix32(v ^ keys[i + 1])) * b >> 32;
    }
    const uint32_t coin = num_tokens > 1 ? keys[max_rounds] & 1 : 0;
#pragma omp parallel for schedule(static) if (num_tokens > 4096)
    for (int64_t row = 0; row < num_tokens; ++row) {
        uint32_t point = static_cast<uint32_t>(row < 2 ? row ^ coin : row);
        do {
            uint32_t right = point / a, left = point - right * a;
            for (const uint32_t* t = table.data(); t != table.data() + table.size(); t += a + b) {
                left += t[right];
                left -= left >= a ? a : 0;
                right += t[b + left];
                right -= right >= b ? b : 0;
            }
            point = right * a + left;
        } while (point >= num_tokens);
        out[row] = static_cast<int32_t>(point);
    }
}

void gather_rows(const float* in, const int64_t* tokens, int64_t n, int64_t d, float* out) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) std::memcpy(out + i * d, in + tokens[i] * d, d * sizeof(float));
}

void scatter_rows(const float* in, const float* bias, const int64_t* tokens, int64_t n, int64_t rows_per_expert,
                  int64_t d, float* out) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        const float* from = in + i * d;
        float* to = out + tokens[i] * d;
        if (bias == nullptr) {
            std::memcpy(to, from, d * sizeof(float));
            continue;
        }
        const float* add = bias + i / rows_per_expert * d;
        for (int64_t j = 0; j < d; ++j) to[j] = from[j] + add[j];
    }
}

namespace {

// One row at a time, in a function of its own: a loop inside an OpenMP region cannot be cloned per processor.
template <class Act>
EWA_INLINE void activate_row(bool gated, int64_t d_ff, const float* bias, const float* scale, float* pre,
                             float* hidden) {
    if (bias != nullptr)
        for (int64_t j = 0; j < (gated ? 2 * d_ff : d_ff); ++j) pre[j] += bias[j];
#pragma omp simd
    for (int64_t j = 0; j < d_ff; ++j) hidden[j] = Act::at(pre[j]).value;
    if (gated)
        for (int64_t j = 0; j < d_ff; ++j) hidden[j] *= pre[d_ff + j];
    if (scale != nullptr)
        for (int64_t j = 0; j < d_ff; ++j) hidden[j] *= scale[j];
}

// What is known when it is compiled is not in the loop: with it there the loop would not be vectorised.
template <class Act, bool gated, bool scaled>
EWA_INLINE void activate_backward_row(int64_t d_ff, const float* scale, const float* __restrict__ pre,
                                      const float* __restrict__ grad_hidden, float* __restrict__ grad_pre,
                                      float* __restrict__ hidden) {
#pragma omp simd
    for (int64_t j = 0; j < d_ff; ++j) {
        const ValueAndSlope act = Act::at(pre[j]);
        float grad = grad_hidden[j];
        float result = act.value;
        if constexpr (scaled) grad *= scale[j];
        if constexpr (gated) {
            grad_pre[d_ff + j] = grad * act.value;
            grad *= pre[d_ff + j];
            result *= pre[d_ff + j];
        }
        if constexpr (scaled) result *= scale[j];
        hidden[j] = result;
        grad_pre[j] = grad * act.slope;
    }
}

#define EWA_ROWS(Act)                                                                                                \
    EWA_CLONES void forward_##Act(bool gated, int64_t d_ff, const float* bias, const float* scale, float* pre,       \
                                  float* hidden) {                                                                   \
        activate_row<Act>(gated, d_ff, bias, scale, pre, hidden);                                                    \
    }                                                                                                                \
    EWA_CLONES void backward_##Act(bool gated, int64_t d_ff, const float* scale, const float* pre,                   \
                                   const float* grad_hidden, float* grad_pre, float* hidden) {                       \
        if (gated && scale != nullptr)                                                                               \
            activate_backward_row<Act, true, true>(d_ff, scale, pre, grad_hidden, grad_pre, hidden);                 \
        else if (gated)                                                                                              \
            activate_backward_row<Act, true, false>(d_ff, scale, pre, grad_hidden, grad_pre, hidden);                \
        else if (scale != nullptr)                                                                                   \
            activate_backward_row<Act, false, true>(d_ff, scale, pre, grad_hidden, grad_pre, hidden);                \
        else                                                                                                         \
            activate_backward_row<Act, false, false>(d_ff, scale, pre, grad_hidden, grad_pre, hidden);               \
    }
EWA_ROWS(Gelu)
EWA_ROWS(GeluTanh)
EWA_ROWS(QuickGelu)
EWA_ROWS(Relu)
EWA_ROWS(Relu2)
EWA_ROWS(Silu)
EWA_ROWS(Identity)
#undef EWA_ROWS

EWA_CLONES void add_row(int64_t columns, const float* row, float* sum) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) sum[j] += row[j];
}

struct Rows {
    void (*forward)(bool, int64_t, const float*, const float*, float*, float*);
    void (*backward)(bool, int64_t, const float*, const float*, const float*, float*, float*);
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

void activate(Activation activation, const Block& block, const float* bias, float* pre, float* hidden) {
    const int64_t columns = block.gated ? 2 * block.d_ff : block.d_ff;
    const auto row = rows_of[static_cast<int>(activation)].forward;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < block.n; ++i)
        row(block.gated, block.d_ff, bias == nullptr ? nullptr : bias + i / block.rows_per_expert * columns,
            block.scale == nullptr ? nullptr : block.scale + i * block.d_ff, pre + i * columns,
            hidden + i * block.d_ff);
}

void activate_backward(Activation activation, const Block& block, const float* pre, const float* grad_hidden,
                       float* grad_pre, float* hidden, float* grad_bias, float beta) {
    const int64_t columns = block.gated ? 2 * block.d_ff : block.d_ff;
    const auto row = rows_of[static_cast<int>(activation)].backward;
    // Each chunk of an expert's rows has a sum of its own, so that the order of additions is always the same.
    constexpr int64_t chunk_rows = 64;
    const int64_t experts = block.n / block.rows_per_expert;
    const int64_t chunks = (block.rows_per_expert + chunk_rows - 1) / chunk_rows;
    std::vector<float> sums(grad_bias == nullptr ? 0 : experts * chunks * columns);
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < experts * chunks; ++c) {
        const int64_t end = (c / chunks + 1) * block.rows_per_expert;
        const int64_t first = end - block.rows_per_expert + c % chunks * chunk_rows;
        for (int64_t i = first; i < std::min(first + chunk_rows, end); ++i) {
            row(block.gated, block.d_ff, block.scale == nullptr ? nullptr : block.scale + i * block.d_ff,
                pre + i * columns, grad_hidden + i * block.d_ff, grad_pre + i * columns, hidden + i * block.d_ff);
            if (grad_bias != nullptr) add_row(columns, grad_pre + i * columns, sums.data() + c * columns);
        }
    }
    if (grad_bias == nullptr) return;
    for (int64_t e = 0; e < experts; ++e) {
        float* total = grad_bias + e * columns;
        for (int64_t j = 0; j < columns; ++j) total[j] = beta == 0.0f ? 0.0f : beta * total[j];
        for (int64_t c = e * chunks; c < (e + 1) * chunks; ++c) add_row(columns, sums.data() + c * columns, total);
    }
}

}  // namespace ewa
