"""How many floating-point operations the layer's matrix products are, from shapes: what `FlopCounterMode` counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Shape = Sequence[int]


def _products(x: Shape, up_weight: Shape, down_weight: Shape, routing_weights: Shape | None) -> tuple[int, int]:
    """Of the up projection and of the down one."""
    num_rows = x[0] if routing_weights is None else math.prod(routing_weights)
    return 2 * num_rows * math.prod(up_weight[1:]), 2 * num_rows * math.prod(down_weight[1:])


def moe_ffn(
    x: Shape,
    up_weight: Shape,
    up_bias: Any,
    down_weight: Shape,
    down_bias: Any,
    routing_weights: Any,
    *_: Any,
    **__: Any,
) -> int:
    """Of `ewa_kernels.ops.moe_ffn`."""
    return sum(_products(x, up_weight, down_weight, routing_weights))


def expert_linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Of `ewa_kernels.linear.expert_linear`."""
    return 2 * x[0] * math.prod(weight[1:])


def expert_linear_backward(
    grad_out: Shape,
    x: Shape | None,
    weight: Shape,
    permutation: Shape,
    expert_offsets: Shape,
    gather: bool,
    scatter: bool,
    output_mask: Sequence[bool],
    *_: Any,
    **__: Any,
) -> int:
    """Of `ewa_kernels.linear.expert_linear_backward`."""
    need_x, need_weight, _need_bias = output_mask
    return expert_linear(grad_out, weight) * (need_x + need_weight)


def moe_ffn_backward(
    grad_y: Shape,
    x: Shape,
    up_weight: Shape,
    up_bias: Any,
    down_weight: Shape,
    down_bias: Any,
    routing_weights: Any,
    seed: Any,
    permutation: Shape,
    expert_offsets: Any,
    pre_activation: Shape,
    activation: str,
    gated: bool,
    dropout_p: float,
    output_mask: Sequence[bool],
    *_: Any,
    **__: Any,
) -> int:
    """Of `ewa_kernels.ops.moe_ffn_backward`, which may compute the up projection again."""
    need_x, need_up_weight, need_up_bias, need_down_weight, _need_down_bias, need_routing = output_mask
    x = (grad_y[0], up_weight[2])  # which may be encoded
    up, down = _products(x, up_weight, down_weight, routing_weights)
    need_pre = need_x or need_up_weight or need_up_bias or need_routing
    # The gradient of routing weights has grad_y times the down biases of all experts.
    by_biases = 2 * math.prod(x) * up_weight[0] if need_routing and down_bias is not None else 0
    again = up if pre_activation[0] == 0 and (need_pre or need_down_weight) else 0
    return again + by_biases + down * (need_pre + need_down_weight) + up * (need_x + need_up_weight)
