"""The activations and their derivatives on a tile of float32, and hidden dropout's mask.

"gelu_16bit" is GELU for float16 and bfloat16: the same function, as exact as their results can show.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .permutation import key_pair, mix32

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_GAUSS = tl.constexpr(0.3989422804014327)  # 1/√(2π)
_TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2·√(2/π)
_TANH_CUBE = tl.constexpr(0.044715)
_QUICK = tl.constexpr(1.702)


@triton.jit
def _normal_tail(v):
    """Q(|v|), the normal distribution's upper tail, to 3e-5 of its value up to |v| = 8, and min(|v|, 8).

    log₂ Q is close to a parabola: a polynomial of degree 7 (fitted for the smallest largest error), seven
    multiply-adds and one exponential, where an accurate erf is some thirty instructions. They count: there is
    an activation for each element of hidden, and no matrix product runs meanwhile.
    """
    m = tl.minimum(tl.abs(v), 8.0)
    p = -1.2624589e-06 * m + 4.8203299e-05
    p = p * m - 8.0724825e-04
    p = p * m + 7.9445783e-03
    p = p * m - 5.2635379e-02
    p = p * m - 4.5995685e-01
    p = p * m - 1.1506100e00
    p = p * m - 1.0000430e00
    return tl.exp2(p), m


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """act(v). The compiler leaves out what only the slope takes."""
    value, _ = activate_with_slope(v, ACTIVATION)
    return value


@triton.jit
def activate_with_slope(v, ACTIVATION: tl.constexpr):
    """act(v) and act'(v), which share their costly part."""
    if ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(v * _SQRT_HALF)
        return v * cdf, cdf + v * _GAUSS * tl.exp(-0.5 * v * v)
    elif ACTIVATION == "gelu_16bit":
        tail, m = _normal_tail(v)
        density = _GAUSS * tl.exp2(-0.7213475204444817 * v * v)
        return tl.where(v < 0, 0.0, v) - m * tail, tl.where(v < 0, tail, 1 - tail) + v * density
    elif ACTIVATION == "gelu_tanh":
        # ½(1 + tanh u) is the sigmoid of 2u, and tanh is no instruction that every target has.
        sigmoid = tl.sigmoid(v * _TANH_SCALE * (v * v * _TANH_CUBE + 1))
        inner = (v * v * (3 * _TANH_CUBE) + 1) * _TANH_SCALE
        return v * sigmoid, sigmoid + v * sigmoid * (1 - sigmoid) * inner
    elif ACTIVATION == "quick_gelu" or ACTIVATION == "silu":
        k: tl.constexpr = _QUICK if ACTIVATION == "quick_gelu" else 1.0
        sigmoid = tl.sigmoid(v * k)
        return v * sigmoid, sigmoid * (1 + v * (1 - sigmoid) * k)
    elif ACTIVATION == "relu":
        # A NaN stays one.
        return tl.where(v < 0, 0.0, v), tl.where(v > 0, 1.0, tl.where(v == v, 0.0, v))
    elif ACTIVATION == "relu2":
        positive = tl.where(v < 0, 0.0, v)
        return positive * positive, 2 * positive
    else:
        tl.static_assert(ACTIVATION == "identity")
        return v, tl.full(v.shape, 1.0, tl.float32)


@triton.jit
def dropout_scale(row, column, seed, threshold, scale):
    """What dropout multiplies hidden by, `[rows, columns]`: 0 or `scale`; see `ewa_kernels.reference.dropout_scale`."""
    keys = key_pair(seed, 13)
    of_row = mix32(row.to(tl.uint32) ^ keys.to(tl.uint32))
    of_column = mix32(column.to(tl.uint32) ^ (keys >> 32).to(tl.uint32))
    bits = mix32(of_row[:, None] + of_column[None, :])
    return tl.where(bits >= threshold.to(tl.uint32, bitcast=True), scale, 0.0)
