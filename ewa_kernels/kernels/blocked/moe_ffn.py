"""The layer's forward and backward, block by block of grouped rows, by a class that has the parts: `TorchRows` in
PyTorch calls; on a CPU `CppProducts` in C++, or `CppRows` with matrix products by PyTorch.

A block goes through both projections before the next one starts: `hidden` is never stored for more than a block, which
is all rows where PyTorch makes products in 16 bits; for backward only `pre_activation` is kept, or nothing at all, in
which case it is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ewa_kernels.kernels.blocked import cpp_rows
from ewa_kernels.kernels.blocked.blocks import Block, blocks, rows_in_a_block
from ewa_kernels.kernels.blocked.cpp_products import CppProducts
from ewa_kernels.kernels.blocked.cpp_rows import have_products
from ewa_kernels.kernels.blocked.torch_rows import Dropout, TorchRows
from ewa_kernels.kernels.choices import grad_of_bias_factor, sum_of_choices
from ewa_kernels.kernels.permutation import random_permutation
from ewa_kernels.kernels.scratch import Scratch

# Of so few rows of an expert PyTorch makes products of bfloat16 faster than C++ does, which packs more.
FEW_ROWS = 256


def _rows(backend: str, activation: str, gated: bool, x: Tensor, rows_of_expert: int) -> TorchRows:
    if backend == "torch":
        return TorchRows(activation, gated, x.dtype, Scratch(x.device, x.dtype))
    dtype = cpp_rows.product_dtype(x.dtype)
    ours = have_products(dtype) and (dtype == torch.float32 or rows_of_expert >= FEW_ROWS)
    return (CppProducts if ours else cpp_rows.CppRows)(activation, gated, dtype, Scratch(x.device, dtype))


def _blocks(
    permutation: Tensor, expert_offsets: Tensor | None, top_k: int, up_weight: Tensor, rows: TorchRows
) -> list[Block]:
    num_experts, num_up = up_weight.shape[:2]
    block_rows = None if rows.sums_in_16_bits else rows_in_a_block(num_up, rows.dtype)
    return blocks(permutation, expert_offsets, top_k, num_experts, block_rows, rows.any_counts)


def moe_ffn_forward(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    routing_weights: Tensor | None,
    seed: Tensor | None,
    permutation: Tensor | None,
    expert_offsets: Tensor | None,
    activation: str,
    gated: bool,
    dropout_p: float,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y [T, D], pre_activation [T·k, F or 2F], in block order, and the permutation drawn, int32 [T].

    The last two are [0] unless `save`, and the permutation also if it was given.
    """
    weights, top_k = _weights(routing_weights)
    rows = _rows(backend, activation, gated, x, len(x) * top_k // len(up_weight))
    seed = None if seed is None else seed.to(x.device)
    x = x.contiguous()
    up_weight, down_weight = rows.parameter(up_weight), rows.parameter(down_weight)
    up_bias, down_bias = (None if bias is None else rows.parameter(bias) for bias in (up_bias, down_bias))
    order = permutation
    if order is None:
        assert seed is not None, "without a partition that is given, a deal needs its seed"
        order = random_permutation(len(x), seed)
    y = x.new_empty(len(order), x.shape[1])
    pre_activation = x.new_empty((len(order), up_weight.shape[1]) if save else 0)
    dropout = Dropout(seed, dropout_p) if seed is not None and dropout_p > 0 else None
    for block in _blocks(order, expert_offsets, top_k, up_weight, rows):
        block_x = rows.look_up(block, x, "x")
        pre = pre_activation[block.saved] if save else None
        factor = None if weights is None else weights[block.choices].to(rows.dtype)
        hidden = rows.up(block, block_x, up_weight, up_bias, dropout, pre)
        rows.down(block, hidden, down_weight, down_bias, factor, y)
    rows.scratch.leave()
    return sum_of_choices(y, top_k), pre_activation, order if save and permutation is None else order.new_empty(0)


def moe_ffn_backward(
    grad_y: Tensor,
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    routing_weights: Tensor | None,
    seed: Tensor | None,
    permutation: Tensor,
    expert_offsets: Tensor | None,
    pre_activation: Tensor,
    activation: str,
    gated: bool,
    dropout_p: float,
    output_mask: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    """Gradients of x, the parameters and the routing weights; [0] where `output_mask` is False.

    Without `pre_activation`, it and the permutation are computed again.
    """
    need_x, need_up_weight, need_up_bias, need_down_weight, need_down_bias, need_routing = output_mask
    need_pre = need_x or need_up_weight or need_up_bias or need_routing
    weights, top_k = _weights(routing_weights)
    rows = _rows(backend, activation, gated, x, len(x) * top_k // len(up_weight))
    seed = None if seed is None else seed.to(x.device)
    x, grad_y = x.contiguous(), grad_y.contiguous()
    inputs = (x, up_weight, up_bias, down_weight, down_bias, routing_weights)
    dtypes = [x.dtype if t is None else t.dtype for t in inputs]
    up_weight, down_weight = rows.parameter(up_weight), rows.parameter(down_weight)
    up_bias, down_bias = (None if bias is None else rows.parameter(bias) for bias in (up_bias, down_bias))
    if len(permutation) == 0 and seed is not None:
        permutation = random_permutation(len(x), seed)

    all_blocks = _blocks(permutation, expert_offsets, top_k, up_weight, rows)
    every_expert_has_rows = len({e for block in all_blocks for e in block.numbers}) == len(up_weight)

    def new(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        make = x.new_empty if every_expert_has_rows else x.new_zeros
        return make(shape, dtype=rows.gradient_dtype(len(shape), dtype, len(all_blocks)))

    grad_x = x.new_empty(len(permutation), x.shape[1]) if need_x else None
    grad_up_weight = new(up_weight.shape, dtypes[1]) if need_up_weight else None
    grad_up_bias = new(up_weight.shape[:2], dtypes[2]) if need_up_bias else None
    grad_down_weight = new(down_weight.shape, dtypes[3]) if need_down_weight else None
    grad_down_bias = new(down_weight.shape[:2], dtypes[4]) if need_down_bias else None
    grad_routing = new(permutation.shape, dtypes[5]) if need_routing else None
    of_bias = None
    if need_routing and down_bias is not None and expert_offsets is not None:
        of_bias = grad_of_bias_factor(grad_y.to(rows.dtype), down_bias, permutation, expert_offsets, top_k)
    dropout = Dropout(seed, dropout_p) if seed is not None and dropout_p > 0 else None
    for block in all_blocks:
        grad_out = rows.look_up(block, grad_y, "y")
        factor = None if weights is None else weights[block.choices].to(rows.dtype)
        if need_down_weight or need_pre:
            block_x = rows.look_up(block, x, "x")
            if len(pre_activation) > 0:
                pre = pre_activation[block.saved]
            else:
                pre = rows.pre_activation(block, block_x, up_weight, up_bias)
            if need_pre:
                grad_factor = None if grad_routing is None else grad_routing.new_empty(len(block.rows))
                grad_pre, hidden = rows.down_backward(block, grad_out, down_weight, pre, dropout, factor, grad_factor)
                if grad_routing is not None and grad_factor is not None:
                    if of_bias is not None:
                        grad_factor += of_bias[block.rows]
                    grad_routing[block.choices] = grad_factor
            else:
                hidden = rows.hidden_again(block, pre, dropout)
        if factor is not None:
            grad_out = rows.scaled(block, grad_out, factor)
        if need_down_weight or need_down_bias:
            right = hidden if need_down_weight else None
            rows.weight_gradient(block, grad_out, right, grad_down_weight, grad_down_bias)
        if need_up_weight or need_up_bias:
            rows.weight_gradient(block, grad_pre, block_x, grad_up_weight, grad_up_bias)
        if grad_x is not None:
            rows.up_backward(block, grad_pre, up_weight, grad_x)
    rows.scratch.leave()
    if grad_x is not None:
        grad_x = sum_of_choices(grad_x, top_k)
    if routing_weights is not None and grad_routing is not None:
        grad_routing = grad_routing.view(routing_weights.shape)
    grads = (grad_x, grad_up_weight, grad_up_bias, grad_down_weight, grad_down_bias, grad_routing)
    return tuple((x.new_empty(0) if g is None else g).to(dtype) for g, dtype in zip(grads, dtypes, strict=True))


def _weights(routing_weights: Tensor | None) -> tuple[Tensor | None, int]:
    """The routing weights by choice, and k."""
    return (None, 1) if routing_weights is None else (routing_weights.flatten(), routing_weights.shape[1])
