// Activations and their derivatives in float32, without a branch, so that compilers vectorise loops over them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "platform.h"

namespace ewa {

struct ValueAndSlope {
    float value;
    float slope;
};

// 1.5·2^23: adding it rounds to a whole number, which is then in the low bits.
constexpr float to_whole = 12582912.0f;

// 2^n · p, where `shifted` is n + to_whole.
EWA_INLINE float scaled_by_power(float p, float shifted) {
    uint32_t bits, exponent;
    std::memcpy(&exponent, &shifted, 4);
    std::memcpy(&bits, &p, 4);
    bits += exponent << 23;
    std::memcpy(&p, &bits, 4);
    return p;
}

// e^y for y ≤ 0, within 2 roundings; y below −87 counts as −87, and a NaN stays one.
EWA_INLINE float exponential(float y) {
    y = y < -87.0f ? -87.0f : y;
    // y = n ln 2 + r with |r| ≤ ln(2)/2.
    const float shifted = y * 1.44269504f + to_whole;
    const float n = shifted - to_whole;
    const float r = (y - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts: n·(first) is exact
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return scaled_by_power(p, shifted);
}

struct Gelu {
    EWA_INLINE ValueAndSlope at(float v) {
        // Φ(v), by formula 7.1.26 of Abramowitz and Stegun (error below 1.5e-7); its e^(−v²/2) serves the slope too.
        const float e = exponential(-0.5f * v * v);
        const float t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * std::fabs(v));
        float p = 1.061405429f;
        p = p * t - 1.453152027f;
        p = p * t + 1.421413741f;
        p = p * t - 0.284496736f;
        p = p * t + 0.254829592f;
        const float tail = 0.5f * p * t * e;
        const float cdf = v > 0.0f ? 1.0f - tail : tail;
        return {v * cdf, cdf + v * e * 0.39894228f};
    }
};

// The same for what is rounded to bfloat16, with half as many operations: within 4e-5 of itself, its slope within 2e-5.
// log₂ of the normal distribution's upper tail is close to a parabola, the hazard rate, which is the density divided by
// the tail, to a line: polynomials up to |v| = 8, fitted for the smallest largest error. Beyond it the tail counts as 0.
struct GeluBFloat16 {
    EWA_INLINE ValueAndSlope at(float v) {
        const float size = std::fabs(v), m = size > 8.0f ? 8.0f : size;
        float y = -1.2624606e-6f;
        y = y * m + 4.8203353e-5f;
        y = y * m - 8.0724891e-4f;
        y = y * m + 7.9445819e-3f;
        y = y * m - 5.2635388e-2f;
        y = y * m - 4.5995684e-1f;
        y = y * m - 1.1506099f;
        y = y * m - 1.0000431f;
        const float shifted = y + to_whole, r = y - (shifted - to_whole);
        float p = 9.68573e-3f;
        p = p * r + 5.592204e-2f;
        p = p * r + 2.4021865e-1f;
        p = p * r + 6.9312103e-1f;
        p = p * r + 1.0000001f;
        const float tail = size > 8.0f ? 0.0f : scaled_by_power(p, shifted);
        float hazard = 6.6081365e-6f;
        hazard = hazard * m - 2.1330061e-4f;
        hazard = hazard * m + 2.9266059e-3f;
        hazard = hazard * m - 2.2636372e-2f;
        hazard = hazard * m + 1.1081935e-1f;
        hazard = hazard * m + 6.3635754e-1f;
        hazard = hazard * m + 7.9787388e-1f;
        const float cdf = v > 0.0f ? 1.0f - tail : tail;
        return {v * cdf, cdf + v * (tail * hazard)};
    }
};

struct GeluTanh {
    EWA_INLINE ValueAndSlope at(float v) {
        const float k = 0.79788456f, c = 0.044715f;
        const float u = k * (v + c * v * v * v);
        const float e = exponential(-2.0f * std::fabs(u));
        const float r = 1.0f / (1.0f + e);
        const float half = u > 0.0f ? r : e * r;  // (1 + tanh u) / 2
        const float one_minus_square = 4.0f * e * r * r;  // 1 − tanh² u
        return {v * half, half + 0.5f * v * one_minus_square * k * (1.0f + 3.0f * c * v * v)};
    }
};

// v σ(kv), k > 0.
EWA_INLINE ValueAndSlope sigmoid_gate(float v, float k) {
    const float e = exponential(-std::fabs(k * v));
    const float r = 1.0f / (1.0f + e);
    const float sigmoid = v > 0.0f ? r : e * r;
    return {v * sigmoid, sigmoid + v * e * r * r * k};
}

struct QuickGelu {
    EWA_INLINE ValueAndSlope at(float v) { return sigmoid_gate(v, 1.702f); }
};

struct Silu {
    EWA_INLINE ValueAndSlope at(float v) { return sigmoid_gate(v, 1.0f); }
};

// Written so that a NaN passes.
struct Relu {
    EWA_INLINE ValueAndSlope at(float v) { return {v <= 0.0f ? 0.0f : v, v <= 0.0f ? 0.0f : 1.0f}; }
};

struct Relu2 {
    EWA_INLINE ValueAndSlope at(float v) {
        const float r = v <= 0.0f ? 0.0f : v;
        return {r * r, 2.0f * r};
    }
};

struct Identity {
    EWA_INLINE ValueAndSlope at(float v) { return {v, 1.0f}; }
};

}  // namespace ewa
