// What is done to one element: conversion, rounding, averaging and the AdamW step. One source for CPUs and GPUs.
//
// Compiled without contraction to fused multiply-adds, and in a fixed order, so that every processor gives the same
// bits (of a NaN, only that it is one).
#pragma once

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#include "platform.h"

namespace ewa {

template <class To, class From>
EWA_ANYWHERE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

enum class Type : int32_t { float32, float64, float16, bfloat16 };

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

// What is computed in.
template <class T>
struct WideOf {
    using type = float;
};
template <>
struct WideOf<double> {
    using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

EWA_ANYWHERE float widen(float x) { return x; }
EWA_ANYWHERE double widen(double x) { return x; }
EWA_ANYWHERE float widen(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
EWA_ANYWHERE float widen(Half x) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(x.bits));
#endif
    const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = (x.bits & 0x7FFFu) << 13;
    const float subnormal = bit_cast<float>(magnitude + 0x38800000u) - 6.103515625e-5f;  // 2^-14 + x − 2^-14
    const uint32_t rebiased = magnitude + (magnitude >= 0x0F800000u ? 0x70000000u : 0x38000000u);
    return bit_cast<float>(sign | (magnitude < 0x00800000u ? bit_cast<uint32_t>(subnormal) : rebiased));
}

// To the nearest T, ties to even.
template <class T>
EWA_ANYWHERE T nearest(Wide<T> x) {
    return x;
}
template <>
EWA_ANYWHERE BFloat16 nearest<BFloat16>(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
    return {static_cast<uint16_t>(x != x ? 0x7FC0u : rounded)};
}
template <>
EWA_ANYWHERE Half nearest<Half>(float x) {
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_rn(x))};
#endif
    const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7FFFFFFFu;
    // Added to 0.5, what is below 2^-14 is rounded to multiples of 2^-24: the spacing of subnormals.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
    const uint32_t normal = (magnitude + 0xFFFu + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
    uint32_t rounded = magnitude < 0x38800000u ? subnormal : normal;
    rounded = magnitude >= 0x477FF000u ? 0x7C00u : rounded;  // 65,520 and more: infinity
    rounded = magnitude > 0x7F800000u ? 0x7E00u : rounded;
    return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | rounded)};
}

// To one of the two neighbours, up with a probability equal to the distance from the lower one: `random` is uniform
// in 0…2^16−1, and below it lies what is cut off. What T can hold stays as it is.
template <class T>
EWA_ANYWHERE T stochastic(Wide<T> x, uint32_t) {
    return x;
}
template <>
EWA_ANYWHERE BFloat16 stochastic<BFloat16>(float x, uint32_t random) {
    const uint32_t rounded = (bit_cast<uint32_t>(x) + random) >> 16;
    return {static_cast<uint16_t>(x != x ? 0x7FC0u : rounded)};
}
template <>
EWA_ANYWHERE Half stochastic<Half>(float x, uint32_t random) {
    const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7FFFFFFFu, up = random & 0x1FFFu;
    // Below 2^-14, in steps of 2^-37: 13 bits below the spacing of subnormals, as in normal numbers.
    const uint32_t small = magnitude < 0x38800000u ? magnitude : 0u;
    const uint32_t subnormal = (static_cast<uint32_t>(static_cast<int32_t>(bit_cast<float>(small) * 0x1p37f)) + up) >> 13;
    const uint32_t normal = (magnitude + up - 0x38000000u) >> 13;
    uint32_t rounded = magnitude < 0x38800000u ? subnormal : normal;
    rounded = magnitude >= 0x47800000u ? 0x7C00u : rounded;
    rounded = magnitude > 0x7F800000u ? 0x7E00u : rounded;
    return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | rounded)};
}

// --- equation 6 ---

// Every expert moves `amount` of its way to the mean. Near 1, what is left of the way is the better measure.
template <class W>
struct Pull {
    W factor;
    bool near;

    EWA_ANYWHERE static Pull of(double share_rate, int num_experts) {
        const double amount = num_experts > 1 ? share_rate * num_experts / (num_experts - 1) : 0.0;
        const bool near = amount >= 0.5;
        return {static_cast<W>(near ? amount - 1.0 : amount), near};
    }
    EWA_ANYWHERE W operator()(W x, W mean) const { return (near ? mean : x) + (mean - x) * factor; }
};

// --- AdamW ---

// A parameter group's options, in double; what depends on the step is in `Adam`.
struct Options {
    double lr;
    const void* lr_at;  // read there if not null
    double beta1, beta2, eps, weight_decay;
    int32_t lr_is_double, maximize;
};

template <class W>
struct Adam {
    W keep, beta1_rest, beta2, beta2_rest, step_size, root_inverse, eps, unscale, sign;

    // Of the step that follows `steps`; gradients are divided by grad_scale.
    EWA_ANYWHERE static Adam of(const Options& options, double lr, float steps, float grad_scale) {
        const double correction1 = 1 - power(options.beta1, steps + 1), correction2 = 1 - power(options.beta2, steps + 1);
        Adam adam;
        adam.keep = static_cast<W>(1 - lr * options.weight_decay);
        adam.beta1_rest = static_cast<W>(1 - options.beta1);
        adam.beta2 = static_cast<W>(options.beta2);
        adam.beta2_rest = static_cast<W>(1 - options.beta2);
        adam.step_size = static_cast<W>(lr / correction1);
        adam.root_inverse = static_cast<W>(1 / std::sqrt(correction2));
        adam.eps = static_cast<W>(options.eps);
        adam.unscale = static_cast<W>(1.0 / static_cast<double>(grad_scale));
        adam.sign = static_cast<W>(options.maximize ? -1 : 1);
        return adam;
    }
    // The same coefficients, rounded to what is computed in.
    template <class Narrow>
    EWA_ANYWHERE Adam<Narrow> to() const {
        return {static_cast<Narrow>(keep),         static_cast<Narrow>(beta1_rest), static_cast<Narrow>(beta2),
                static_cast<Narrow>(beta2_rest),   static_cast<Narrow>(step_size),  static_cast<Narrow>(root_inverse),
                static_cast<Narrow>(eps),          static_cast<Narrow>(unscale),    static_cast<Narrow>(sign)};
    }
    // Returns the parameter; grad is unscaled, exp_avg and exp_avg_sq are changed.
    EWA_ANYWHERE W operator()(W param, W& grad, W& exp_avg, W& exp_avg_sq) const {
        grad = grad * unscale;
        exp_avg = exp_avg + (grad * sign - exp_avg) * beta1_rest;
        exp_avg_sq = exp_avg_sq * beta2 + grad * grad * beta2_rest;
        const W denominator = std::sqrt(exp_avg_sq) * root_inverse + eps;
        return param * keep - step_size * exp_avg / denominator;
    }

   private:
    // x^n for whole n, by squaring: the same on every processor, as pow is not.
    EWA_ANYWHERE static double power(double x, float n) {
        double result = 1;
        for (uint32_t left = static_cast<uint32_t>(n); left > 0; left >>= 1, x *= x)
            if (left & 1) result *= x;
        return result;
    }
};

}  // namespace ewa
