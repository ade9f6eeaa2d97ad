// Products of matrices of float32 or bfloat16 on a CPU with AVX-512, one for each expert, with what comes before and after
// them: rows are looked up while they are packed, and what is done to rows of the result is done while they are in the
// cache.
//
// Rows of tokens are grouped by expert; groups may be of any size, also empty. No result depends on the number of
// threads. Nothing is checked here; ewa_kernels/kernels/blocked/cpp_products.py does that.
#pragma once

#include <cstdint>
#include <vector>

#include "rows.h"

namespace ewa {

// Whether this build has them, and this processor, with nothing that is faster: AMX for bfloat16.
bool have_products(Type type);

// That a product may have now.
int64_t max_threads();

// Rows starts[e] … starts[e + 1] − 1 are expert e's.
struct Groups {
    std::vector<int64_t> starts;

    explicit Groups(const std::vector<int64_t>& counts) : starts{0} {
        for (const int64_t count : counts) starts.push_back(starts.back() + count);
    }
    int64_t experts() const { return starts.size() - 1; }
    int64_t rows(int64_t e) const { return starts[e + 1] - starts[e]; }
};

struct Weights {
    Matrix matrix;    // [experts, rows, columns]
    bool transposed;  // multiplied by [columns, rows] of each expert
};

// Rows of a matrix, one for each grouped row.
struct Tokens {
    Matrix matrix;        // [any, columns]
    const int64_t* rows;  // which ones, or null: in order
    const float* factor;  // what each is multiplied by, or null
};

// tokens [rows, k] · weights [k, n] of each expert.
struct TimesWeights {
    Groups groups;
    int64_t k, n;
    Tokens tokens;
    Weights weights;
    bool bfloat16;  // what numbers are rounded to before they are multiplied; their products are summed up in float32
    int64_t threads = max_threads();
};

// leftᵀ [m, rows] · right [rows, n] of each expert.
struct Outer {
    Groups groups;
    int64_t m, n;
    Tokens left, right;
    bool bfloat16;
    int64_t threads = max_threads();
};

// Floats that a product needs to work in.
int64_t workspace_floats(const TimesWeights& product);
int64_t workspace_floats(const Outer& product);

// What is then done with row `row` of the result, expert e's: rows.h has such functions. If `result` is null, rows of the
// result are passed on to it and not kept.
void multiply(const TimesWeights& product, float* workspace, float* result, const RowFunction& then);

// result [experts, m, n] = beta·result + the product; sums [experts, m] = beta·sums + the sums over left's rows, unless
// that is null. beta is 0 or 1. The result is of float32, or of 16 bits if beta is 0.
void multiply(const Outer& product, float* workspace, float beta, Matrix result, float* sums);

}  // namespace ewa
