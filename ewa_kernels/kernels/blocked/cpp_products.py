"""The layer in C++ on the CPU, matrix products too, of float32 or bfloat16: one call. See `csrc/layer/moe_ffn.h`.

Tokens are looked up by the products themselves, and rows of a result are activated or scattered while they are in the
cache, so that neither is stored in between. Experts may have any number of rows each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...problem import Deal, Inputs, Problem
from .. import codec, extension
from ..choices import grad_of_bias_factor
from ..parameter_pass import DTYPES
from ..reused import Reused
from ..scratch import Scratch
from .cpp_rows import address, matrix

if extension.WHY_NOT is None:
    from ... import _C


def _pass(
    problem: Problem, dtype: torch.dtype, block_rows: int, inputs: Inputs, deal: Deal, backward: bool
) -> _C.LayerPass:
    """`dtype`: what products are made in. Where groups are equal it is kept."""
    key = (dtype, block_rows, backward, torch.get_num_threads())
    kept: _C.LayerPass | None = problem.kept.get(key)
    if kept is not None:
        return kept
    layer = _C.Layer(
        problem.num_tokens,
        problem.top_k,
        problem.num_experts,
        problem.d_model,
        problem.d_ff,
        getattr(_C.Activation, problem.activation),
        problem.gated,
        problem.dropout_p,
        dtype == torch.bfloat16,
        DTYPES[problem.dtype],
        [0 if t is None else DTYPES[t.dtype] for t in inputs.parameters],
        None if problem.pre_format is None else codec.of_cpp(problem.pre_format),
    )
    made = _C.LayerPass(layer, address(deal.expert_offsets), block_rows, backward)
    if deal.expert_offsets is None:
        problem.kept[key] = made
    return made


def _weights(routing_weights: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As they multiply rows of `dtype`, in float32."""
    return None if routing_weights is None else routing_weights.to(dtype).float().contiguous()


def forward(
    problem: Problem, dtype: torch.dtype, block_rows: int, inputs: Inputs, deal: Deal
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y `[R, D]` by choice, pre_activation `[R, F or 2F]`, in block order or None, and the permutation."""
    x, up_weight, up_bias, down_weight, down_bias, routing_weights = inputs
    permutation, is_dealt = deal.permutation, deal.permutation is None
    weights = _weights(routing_weights, dtype)
    if permutation is None:
        permutation = x.new_empty(problem.num_tokens, dtype=torch.int32)
    y = x.new_empty(problem.num_rows, problem.d_model)
    pre_activation = problem.new_pre_activation(Reused.empty)
    work = _pass(problem, dtype, block_rows, inputs, deal, backward=False)
    scratch = Scratch(x.device, dtype)
    work.forward(
        x.data_ptr(),
        up_weight.data_ptr(),
        address(up_bias),
        down_weight.data_ptr(),
        address(down_bias),
        address(weights),
        int(deal.seed or 0),
        permutation.data_ptr(),
        is_dealt,
        y.data_ptr(),
        address(pre_activation),
        scratch.address("layer", work.memory_bytes),
    )
    scratch.leave()
    return y, pre_activation, permutation


def backward(
    problem: Problem,
    dtype: torch.dtype,
    block_rows: int,
    grad_y: Tensor,
    inputs: Inputs,
    deal: Deal,
    pre_activation: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x `[R, D]` by choice, of the parameters and of the routing weights `[R]`; None if not needed."""
    x, up_weight, up_bias, down_weight, down_bias, routing_weights = inputs
    permutation, expert_offsets = deal.permutation, deal.expert_offsets
    assert permutation is not None
    weights = _weights(routing_weights, dtype)
    work = _pass(problem, dtype, block_rows, inputs, deal, backward=True)

    def new(i: int, like: Tensor | None, at_once: bool) -> Tensor | None:
        """A weight's gradient is rounded to 16 bits as it is stored, if it is stored once; a bias's is not."""
        if like is None or not needed[i]:
            return None
        own = problem.input_dtypes[i]
        if own is None or own.itemsize != 2 or not at_once or work.num_blocks > 1:
            own = torch.float32
        return Reused.empty(like.shape, own, like.device)

    grads = [
        x.new_empty(problem.num_rows, problem.d_model) if needed[0] else None,
        new(1, up_weight, True),
        new(2, up_bias, False),
        new(3, down_weight, True),
        new(4, down_bias, False),
        new(5, weights, False),
    ]
    of_bias = None
    if grads[5] is not None and down_bias is not None and expert_offsets is not None:
        rounded = down_bias.to(dtype)
        of_bias = grad_of_bias_factor(grad_y.to(dtype), rounded, permutation, expert_offsets, problem.top_k).float()
    scratch = Scratch(x.device, dtype)
    work.backward(
        grad_y.data_ptr(),
        x.data_ptr(),
        up_weight.data_ptr(),
        address(up_bias),
        down_weight.data_ptr(),
        address(weights),
        int(deal.seed or 0),
        permutation.data_ptr(),
        address(pre_activation),
        address(grads[0]),
        matrix(grads[1]),
        address(grads[2]),
        matrix(grads[3]),
        address(grads[4]),
        address(grads[5]),
        address(of_bias),
        scratch.address("layer", work.memory_bytes),
    )
    scratch.leave()
    return grads
