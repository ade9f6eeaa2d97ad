// Gradients in 8 bits, as ranks exchange them: specified by ewa_kernels/kernels/exchange.py.
#pragma once

#include <cstdint>

#include "layer/matrix.h"

namespace ewa {

constexpr int64_t exchange_block = 128;  // elements that share a scale, which is a bfloat16

// Codes of n elements, and scales; the last block may have fewer elements, and all its codes are written. `residual` [n]
// or null is added before, and is what was lost after.
void encode_gradient(Matrix from, int64_t n, int8_t* codes, uint16_t* scales, float* residual);
void decode_gradient(const int8_t* codes, const uint16_t* scales, int64_t n, Matrix to);
// to[i] = factor · Σ of what `count` ranks have sent, in their order; from one rank's codes, and scales, to the next's
// there are `stride` bytes. n is a multiple of exchange_block.
void sum_gradients(const int8_t* codes, const uint16_t* scales, int64_t count, int64_t stride, int64_t n, float factor,
                   float* to);

}  // namespace ewa
