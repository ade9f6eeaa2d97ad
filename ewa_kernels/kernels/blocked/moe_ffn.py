"""The layer's forward and backward, block by block of grouped rows: in PyTorch calls (`TorchRows`); on a CPU in C++, in
part with PyTorch's matrix products (`CppRows`) or all of it in one call (`cpp_products`).

A block goes through both projections before the next one starts: `hidden` is never stored for more than a block, which
is all rows where PyTorch makes products in 16 bits; for backward only `pre_activation` is kept, or nothing at all, in
which case it is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...problem import Deal, Inputs, Problem
from .. import codec
from ..choices import grad_of_bias_factor, sum_of_choices
from ..copies import in_dtype
from ..permutation import random_permutation
from ..reused import Reused
from ..scratch import Scratch
from . import cpp_products, cpp_rows
from .blocks import Block, blocks, rows_in_a_block
from .products import products_of
from .torch_rows import Dropout, TorchRows


def caster(problem: Problem) -> Callable[[Tensor], Tensor]:
    """Makes parameters contiguous, and of the dtype of products: under autocast they are of another one than x."""
    dtype, by_cpp = products_of(problem)
    # C++ widens what has 16 bits as it reads it.
    widened = (torch.float16, torch.bfloat16) if dtype == torch.float32 and by_cpp else ()

    def cast(t: Tensor) -> Tensor:
        return (t if t.dtype == dtype or t.dtype in widened else in_dtype(t, dtype)).contiguous()

    return cast


def prepared(problem: Problem, inputs: Inputs) -> Inputs:
    """Contiguous; parameters as `caster` makes them."""
    cast = caster(problem)
    x, up_weight, up_bias, down_weight, down_bias, routing_weights = inputs
    up_bias, down_bias = (None if bias is None else cast(bias) for bias in (up_bias, down_bias))
    return Inputs(x.contiguous(), cast(up_weight), up_bias, cast(down_weight), down_bias, routing_weights)


def _blocks(problem: Problem, permutation: Tensor, expert_offsets: Tensor | None, rows: TorchRows) -> list[Block]:
    # In 16 bits gradients would be rounded after each block that is added to them.
    block_rows = None if rows.dtype.itemsize == 2 else rows_in_a_block(problem.num_up, rows.dtype)
    return blocks(permutation, expert_offsets, problem.top_k, problem.num_experts, block_rows)


def _rows(problem: Problem, dtype: torch.dtype) -> TorchRows:
    kind = cpp_rows.CppRows if problem.backend == "cpp" else TorchRows
    return kind(problem.activation, problem.gated, dtype, Scratch(problem.device, dtype))


def forward(problem: Problem, inputs: Inputs, deal: Deal) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `kernels/moe_ffn.py`; pre_activation is in block order."""
    x, up_weight, up_bias, down_weight, down_bias, routing_weights = inputs
    dtype, by_cpp = products_of(problem)
    if by_cpp:
        block_rows = rows_in_a_block(problem.num_up, dtype)
        y, pre_activation, permutation = cpp_products.forward(problem, dtype, block_rows, inputs, deal)
        return sum_of_choices(y, problem.top_k), pre_activation, permutation
    rows = _rows(problem, dtype)
    weights = None if routing_weights is None else routing_weights.flatten()
    permutation, dropout = _permutation(problem, deal), _dropout(problem, deal)
    y = x.new_empty(problem.num_rows, problem.d_model)
    pre_activation, form = problem.new_pre_activation(Reused.empty), problem.pre_format
    for block in _blocks(problem, permutation, deal.expert_offsets, rows):
        block_x = rows.look_up(block, x, "x")
        pre = None if pre_activation is None or form is not None else _saved(pre_activation, block)
        product = pre if pre is not None and pre.dtype == dtype else rows.new(block, "pre", problem.num_up)
        if form is not None:
            pre = product
        bias = rows.linear(block, block_x, up_weight, up_bias, product)
        hidden = rows.new(block, "hidden", problem.d_ff)
        rows.activate(product, bias, block.rows, dropout, pre, hidden)
        if pre_activation is not None and form is not None:
            first, flat = block.saved.start, product.flatten(0, 1)
            codec.encode_into(pre_activation, problem.num_rows, first, flat, form, problem.backend)
        product = rows.new(block, "y", problem.d_model)
        bias = rows.linear(block, hidden, down_weight, down_bias, product)
        factor = None if weights is None else weights[block.choices].to(dtype)
        rows.scatter(product, bias, factor, block.choices, y)
    rows.scratch.leave()
    return sum_of_choices(y, problem.top_k), pre_activation, permutation


def backward(
    problem: Problem, grad_y: Tensor, inputs: Inputs, deal: Deal, pre_activation: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """See `kernels/moe_ffn.py`."""
    grad_y, (dtype, by_cpp) = grad_y.contiguous(), products_of(problem)
    if deal.permutation is None:
        deal = deal._replace(permutation=_permutation(problem, deal))
    if by_cpp:
        block_rows = rows_in_a_block(problem.num_up, dtype)
        grads = cpp_products.backward(problem, dtype, block_rows, grad_y, inputs, deal, pre_activation, needed)
    else:
        grads = _backward_by_blocks(problem, _rows(problem, dtype), grad_y, inputs, deal, pre_activation, needed)
    if grads[0] is not None:
        grads[0] = sum_of_choices(grads[0], problem.top_k)
    if grads[5] is not None and inputs.routing_weights is not None:
        grads[5] = grads[5].view(inputs.routing_weights.shape)
    return problem.gradients(grads)


def _backward_by_blocks(
    problem: Problem,
    rows: TorchRows,
    grad_y: Tensor,
    inputs: Inputs,
    deal: Deal,
    pre_activation: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients; x's by choice, the routing weights' `[R]`."""
    x, up_weight, up_bias, down_weight, down_bias, routing_weights = inputs
    dropout, permutation, expert_offsets = _dropout(problem, deal), _permutation(problem, deal), deal.expert_offsets
    form = problem.pre_format
    need_x, need_up_weight, need_up_bias, need_down_weight, need_down_bias, need_routing = needed
    need_pre = need_x or need_up_weight or need_up_bias or need_routing
    weights = None if routing_weights is None else routing_weights.flatten()
    all_blocks = _blocks(problem, permutation, expert_offsets, rows)
    every_expert_has_rows = sum(len(b.counts) for b in all_blocks if b.beta == 0) == problem.num_experts

    def new(need: bool, like: Tensor | None) -> Tensor | None:
        if like is None or not need:
            return None
        grad = Reused.empty(like.shape, rows.dtype, like.device)
        return grad if every_expert_has_rows else grad.zero_()

    grad_x = x.new_empty(problem.num_rows, problem.d_model) if need_x else None
    grad_up_weight, grad_up_bias = new(need_up_weight, up_weight), new(need_up_bias, up_bias)
    grad_down_weight, grad_down_bias = new(need_down_weight, down_weight), new(need_down_bias, down_bias)
    grad_routing = new(need_routing, weights)
    of_bias = None
    if need_routing and down_bias is not None and expert_offsets is not None:
        of_bias = grad_of_bias_factor(grad_y.to(rows.dtype), down_bias, permutation, expert_offsets, problem.top_k)
    for block in all_blocks:
        grad_out = rows.look_up(block, grad_y, "y")
        factor = None if weights is None else weights[block.choices].to(rows.dtype)
        if need_down_weight or need_pre:
            block_x = rows.look_up(block, x, "x")
            if pre_activation is not None and form is None:
                pre = _saved(pre_activation, block)
            else:
                pre = rows.new(block, "pre", problem.num_up)
            if pre_activation is not None and form is not None:
                first, flat = block.saved.start, pre.flatten(0, 1)
                codec.decode_from(pre_activation, problem.num_rows, first, flat, form, problem.backend)
            elif pre_activation is None:
                bias = rows.linear(block, block_x, up_weight, up_bias, pre)
                if bias is not None:
                    pre += bias.unsqueeze(1)
            hidden = rows.new(block, "hidden", problem.d_ff)
            if need_pre:
                grad_hidden = rows.new(block, "grad_hidden", problem.d_ff)
                torch.bmm(grad_out, block.of(down_weight), out=grad_hidden)
                in_place = factor is None and not problem.gated
                grad_pre = grad_hidden if in_place else rows.new(block, "grad_pre", problem.num_up)
                grad_factor = None if grad_routing is None else grad_routing.new_empty(len(block.rows))
                rows.activate_backward(pre, grad_hidden, block.rows, dropout, factor, grad_pre, hidden, grad_factor)
                if grad_routing is not None and grad_factor is not None:
                    if of_bias is not None:
                        grad_factor += of_bias[block.rows]
                    grad_routing[block.choices] = grad_factor
            else:
                rows.activate(pre, None, block.rows, dropout, None, hidden)
        if factor is not None:
            grad_out.mul_(factor.view(*grad_out.shape[:2], 1))
        if grad_down_weight is not None:
            block.of(grad_down_weight).baddbmm_(grad_out.mT, hidden, beta=block.beta)
        if grad_down_bias is not None:
            _add_sum(block, grad_out, grad_down_bias)
        if grad_up_weight is not None:
            block.of(grad_up_weight).baddbmm_(grad_pre.mT, block_x, beta=block.beta)
        if grad_up_bias is not None:
            _add_sum(block, grad_pre, grad_up_bias)
        if grad_x is not None:
            product = rows.new(block, "y", problem.d_model)  # of grad_out, which is done with
            torch.bmm(grad_pre, block.of(up_weight), out=product)
            rows.scatter(product, None, None, block.choices, grad_x)
    rows.scratch.leave()
    return [grad_x, grad_up_weight, grad_up_bias, grad_down_weight, grad_down_bias, grad_routing]


def _saved(pre_activation: Tensor, block: Block) -> Tensor:
    return pre_activation[block.saved].unflatten(0, (len(block.counts), block.counts[0]))


def _add_sum(block: Block, grad: Tensor, grad_bias: Tensor) -> None:
    """grad_bias = beta · grad_bias + the sum of grad over rows."""
    if block.beta == 0:
        torch.sum(grad, 1, out=block.of(grad_bias))
    else:
        block.of(grad_bias).add_(grad.sum(1))


def _permutation(problem: Problem, deal: Deal) -> Tensor:
    if deal.permutation is not None:
        return deal.permutation
    assert deal.seed is not None, "without a partition that is given, a deal needs its seed"
    return random_permutation(problem.num_tokens, deal.seed, problem.device)


def _dropout(problem: Problem, deal: Deal) -> Dropout | None:
    return Dropout(deal.seed, problem.dropout_p) if deal.seed is not None and problem.dropout_p > 0 else None
