// The activations and their derivatives on the accumulators, as `kernels/triton/activations.py` has them for 16 bits:
// as exact as those can show, and with few instructions, which a product must hide.
#pragma once

#include "instructions.cuh"

namespace ewa::hopper {

struct ActivationAndSlope {
    float value, slope;
};

namespace constants {
constexpr float log2_e = 1.4426950408889634f;
}  // namespace constants

// Q(|v|), the normal distribution's upper tail, to 3e-5 of its value up to |v| = 8, and m = min(|v|, 8).
__device__ __forceinline__ float normal_tail(float v, float& m) {
    m = fminf(fabsf(v), 8.0f);
    float p = fmaf(-1.2624589e-06f, m, 4.8203299e-05f);
    p = fmaf(p, m, -8.0724825e-04f);
    p = fmaf(p, m, 7.9445783e-03f);
    p = fmaf(p, m, -5.2635379e-02f);
    p = fmaf(p, m, -4.5995685e-01f);
    p = fmaf(p, m, -1.1506100e+00f);
    return exp2_approx(fmaf(p, m, -1.0000430e+00f));
}

struct Gelu {
    __device__ __forceinline__ static float value(float v) {
        float m;
        const float tail = normal_tail(v, m);
        return fmaf(-m, tail, max_nan(v, 0.0f));
    }
    __device__ __forceinline__ static ActivationAndSlope both(float v) {
        float m;
        const float tail = normal_tail(v, m);
        const float density = exp2_approx(fmaf(v * v, -0.5f * constants::log2_e, -1.3257480647361593f));  // log₂ 1/√2π
        const float cdf = v < 0.0f ? tail : 1.0f - tail;
        return {fmaf(-m, tail, max_nan(v, 0.0f)), fmaf(v, density, cdf)};
    }
};

// 1 / (1 + e^−v); for −∞ it is 1 / ∞.
__device__ __forceinline__ float sigmoid(float v) {
    return reciprocal_approx(1.0f + exp2_approx(v * -constants::log2_e));
}

struct GeluTanh {
    // ½ (1 + tanh u) is the sigmoid of 2u.
    static constexpr float scale = 1.5957691216057308f, cube = 0.044715f;
    __device__ __forceinline__ static float value(float v) { return v * sigmoid(v * scale * fmaf(v * v, cube, 1.0f)); }
    __device__ __forceinline__ static ActivationAndSlope both(float v) {
        const float s = sigmoid(v * scale * fmaf(v * v, cube, 1.0f));
        const float inner = scale * fmaf(v * v, 3 * cube, 1.0f);
        return {v * s, fmaf(v * s * (1.0f - s), inner, s)};
    }
};

struct QuickGelu {
    static constexpr float scale = 1.702f;
    __device__ __forceinline__ static float value(float v) { return v * sigmoid(v * scale); }
    __device__ __forceinline__ static ActivationAndSlope both(float v) {
        const float s = sigmoid(v * scale);
        return {v * s, s * fmaf(v * scale, 1.0f - s, 1.0f)};
    }
};

struct Silu {
    __device__ __forceinline__ static float value(float v) { return v * sigmoid(v); }
    __device__ __forceinline__ static ActivationAndSlope both(float v) {
        const float s = sigmoid(v);
        return {v * s, s * fmaf(v, 1.0f - s, 1.0f)};
    }
};

// A NaN stays one.
struct Relu {
    __device__ __forceinline__ static float value(float v) { return max_nan(v, 0.0f); }
    __device__ __forceinline__ static ActivationAndSlope both(float v) {
        return {max_nan(v, 0.0f), v > 0.0f ? 1.0f : max_nan(v, 0.0f)};
    }
};

struct Relu2 {
    __device__ __forceinline__ static float value(float v) { return max_nan(v, 0.0f) * max_nan(v, 0.0f); }
    __device__ __forceinline__ static ActivationAndSlope both(float v) {
        const float r = max_nan(v, 0.0f);
        return {r * r, r + r};
    }
};

struct Identity {
    __device__ __forceinline__ static float value(float v) { return v; }
    __device__ __forceinline__ static ActivationAndSlope both(float v) { return {v, 1.0f}; }
};

}  // namespace ewa::hopper
