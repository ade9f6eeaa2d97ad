"""The layer's forward and backward by Triton kernels: what is allocated, which kernels are launched."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ewa_kernels.kernels.choices import existing, grad_of_bias_factor, sum_of_choices
from ewa_kernels.kernels.copies import in_dtype
from ewa_kernels.kernels.triton.backward import launch_backward, split_is_faster
from ewa_kernels.kernels.triton.configs import aligned
from ewa_kernels.kernels.triton.forward import launch_forward
from ewa_kernels.kernels.triton.layer import Layer, check_sizes
from ewa_kernels.kernels.triton.onchip import launch_onchip
from ewa_kernels.problem import Deal, Inputs, Problem

_NOTHING = contextlib.nullcontext()


def prepared(problem: Problem, inputs: Inputs) -> Inputs:
    """Contiguous and aligned, weights in x's dtype. Biases keep theirs."""
    x, up_weight, up_bias, down_weight, down_bias, routing_weights = inputs
    up_weight, down_weight = (in_dtype(weight, problem.dtype).contiguous() for weight in (up_weight, down_weight))
    if up_weight.data_ptr() % 16 or down_weight.data_ptr() % 16:
        _warn_once_of_copies()
    up_bias, down_bias = (None if bias is None else aligned(bias.contiguous()) for bias in (up_bias, down_bias))
    return Inputs(
        aligned(x.contiguous()), aligned(up_weight), up_bias, aligned(down_weight), down_bias, routing_weights
    )


def forward(problem: Problem, inputs: Inputs, deal: Deal) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `kernels/moe_ffn.py`; pre_activation is by grouped row."""
    x, permutation = inputs.x, deal.permutation
    layer = Layer(problem, deal.seed, deal.expert_offsets, inputs.routing_weights)
    form = layer.kept("form", lambda: _form(layer))
    with on_device(x):
        y = x.new_empty(layer.num_rows, layer.d_model)
        pre_activation = x.new_empty(layer.num_rows, problem.num_up) if problem.save else None
        is_dealt = permutation is None
        permutation = x.new_empty(layer.num_rows, dtype=torch.int32) if permutation is None else aligned(permutation)
        operands = (x, *inputs.parameters)
        if layer.num_rows > 0:
            if form == "onchip":
                launch_onchip(layer, *operands, y, pre_activation, permutation, deal=is_dealt)
            else:
                hidden = x.new_empty(layer.num_rows, layer.d_ff)
                for step in ("up", "down") if form == "split" else ("single",):
                    launch_forward(layer, *operands, y, pre_activation, hidden, permutation, form=step, deal=is_dealt)
    return sum_of_choices(y, layer.top_k), pre_activation, permutation


def backward(
    problem: Problem, grad_y: Tensor, inputs: Inputs, deal: Deal, pre_activation: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """See `kernels/moe_ffn.py`. Without `pre_activation` there is a launch more."""
    x, up_weight, _, down_weight, down_bias, routing_weights = inputs
    permutation, expert_offsets = deal.permutation, deal.expert_offsets
    layer = Layer(problem, deal.seed, expert_offsets, routing_weights)
    form = layer.kept("form", lambda: _form(layer))
    _, up_dtype, _, down_dtype, *_ = problem.input_dtypes
    assert up_dtype is not None
    assert down_dtype is not None
    # One kernel writes both weights' gradients, to one type.
    of_weights = torch.promote_types(up_dtype, down_dtype)
    dtypes = (problem.dtype, of_weights, problem.input_dtypes[2], of_weights, problem.input_dtypes[4])
    *needed, need_routing = needed
    grad_routing = None
    with on_device(x):
        # Nothing is launched for no tokens.
        new = torch.empty if layer.num_rows > 0 else torch.zeros
        shapes = [(layer.num_rows, layer.d_model), *(() if t is None else t.shape for t in inputs[1:5])]
        grads = [
            new(shape, dtype=dtype, device=x.device) if t is not None and need else None
            for t, shape, dtype, need in zip(inputs[:5], shapes, dtypes, needed, strict=True)
        ]
        if layer.num_rows > 0 and (need_routing or any(needed)):
            grad_y, is_dealt = aligned(grad_y.contiguous()), permutation is None
            permutation = (
                x.new_empty(layer.num_rows, dtype=torch.int32) if permutation is None else aligned(permutation)
            )
            if pre_activation is None:
                pre_activation = x.new_empty(layer.num_rows, problem.num_up)
                operands = (x, *inputs.parameters)
                launch_forward(layer, *operands, None, pre_activation, None, permutation, form="up", deal=is_dealt)
            pieces = launch_backward(
                layer,
                grad_y,
                x,
                up_weight,
                down_weight,
                aligned(pre_activation),
                permutation,
                *grads,
                need_routing=need_routing,
                single=problem.backend == "triton-single" or not (form == "split" or split_is_faster(layer)),
            )
            if pieces is not None and routing_weights is not None:
                by_row = pieces.sum(0)
                if down_bias is not None and expert_offsets is not None:
                    by_row += grad_of_bias_factor(grad_y, down_bias, permutation, expert_offsets, layer.top_k)
                grad_routing = torch.empty_like(by_row).index_copy_(0, existing(permutation), by_row)
                grad_routing = grad_routing.view(routing_weights.shape)
        elif need_routing and routing_weights is not None:
            grad_routing = torch.zeros_like(routing_weights)
        if grads[0] is not None:
            grads[0] = sum_of_choices(grads[0], layer.top_k)
    return problem.gradients((*grads, grad_routing))


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """In which kernels are launched where the tensor is."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _NOTHING


@functools.cache
def _warn_once_of_copies() -> None:
    warnings.warn(
        "weights of experts are copied in each call, because their addresses are no multiples of 16 bytes, as in a "
        "flat buffer behind a parameter of odd size: pad the buffer",
        stacklevel=2,
    )


def _form(layer: Layer) -> str:
    """ "single", "split" or "onchip": what the backend names, or what is best."""
    check_sizes(layer.problem)
    backend = layer.problem.backend
    _, _, form = backend.partition("-")
    fits = layer.onchip_tile() is not None
    if form == "onchip" and not fits:
        raise ValueError(
            f"backend={backend!r} is for 16-bit types and small d_model, got {layer.dtype} and {layer.d_model}: "
            "use backend='triton'"
        )
    return form or ("onchip" if fits else "single")
