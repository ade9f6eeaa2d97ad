"""The layer's forward and backward by Triton kernels: what is allocated, which kernels are launched."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ...problem import Deal, Inputs, Problem
from .. import forms
from ..choices import grad_of_routing_weights, sum_of_choices
from ..copies import in_dtype
from ..devices import on_device
from .backward import launch_backward
from .configs import aligned
from .forward import launch_forward
from .layer import Layer, check_sizes
from .onchip import launch_onchip
from .split import launch_down, launch_up


def prepared(problem: Problem, inputs: Inputs) -> Inputs:
    """Contiguous and aligned, weights in x's dtype. Biases keep theirs."""
    x, up_weight, up_bias, down_weight, down_bias, routing_weights = inputs
    up_weight, down_weight = (in_dtype(weight, problem.dtype).contiguous() for weight in (up_weight, down_weight))
    if up_weight.data_ptr() % 16 or down_weight.data_ptr() % 16:
        warn_once_of_copies()
    up_bias, down_bias, routing_weights = (
        None if tensor is None else aligned(tensor.contiguous()) for tensor in (up_bias, down_bias, routing_weights)
    )
    x, up_weight, down_weight = aligned(x.contiguous()), aligned(up_weight), aligned(down_weight)
    return Inputs(x, up_weight, up_bias, down_weight, down_bias, routing_weights)


def forward(problem: Problem, inputs: Inputs, deal: Deal) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `kernels/moe_ffn.py`; pre_activation is by grouped row."""
    x, num_rows, layer = inputs.x, problem.num_rows, Layer(problem, inputs, deal)
    form = layer.kept(_form)
    with on_device(x):
        y = x.new_empty(num_rows, problem.d_model)
        pre_activation = problem.new_pre_activation()
        if num_rows > 0:
            if form == "onchip":
                launch_onchip(layer, y, pre_activation)
            else:
                hidden = x.new_empty(num_rows, problem.d_ff)
                if form == "single":
                    launch_forward(layer, y, pre_activation, hidden)
                else:
                    launch_up(layer, pre_activation, hidden)
                    launch_down(layer, y, hidden)
    return sum_of_choices(y, problem.top_k), pre_activation, layer.tensors["permutation"]


def backward(
    problem: Problem, grad_y: Tensor, inputs: Inputs, deal: Deal, pre_activation: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """See `kernels/moe_ffn.py`. Without `pre_activation` there is a launch more."""
    x, layer, routing_weights = inputs.x, Layer(problem, inputs, deal), inputs.routing_weights
    layer.kept(_form)  # raises what the forward does
    *needed, need_routing = needed
    _, up_dtype, up_bias_dtype, down_dtype, down_bias_dtype, _ = problem.input_dtypes
    assert up_dtype is not None
    assert down_dtype is not None
    # One kernel writes both weights' gradients, to one type.
    of_weights = torch.promote_types(up_dtype, down_dtype)
    dtypes = (problem.dtype, of_weights, up_bias_dtype, of_weights, down_bias_dtype)
    shapes = [(problem.num_rows, problem.d_model), *(None if t is None else t.shape for t in inputs.parameters)]
    grad_routing = None
    with on_device(x):
        # Nothing is launched for no tokens.
        new = torch.empty if problem.num_rows > 0 else torch.zeros
        grads = [
            new(shape, dtype=dtype, device=x.device) if shape is not None and need else None
            for shape, dtype, need in zip(shapes, dtypes, needed, strict=True)
        ]
        if problem.num_rows > 0 and (need_routing or any(needed)):
            grad_y = aligned(grad_y.contiguous())
            if pre_activation is None:
                pre_activation = x.new_empty(problem.num_rows, problem.num_up)
                launch_up(layer, pre_activation, None)
            pieces = launch_backward(layer, grad_y, aligned(pre_activation), grads, need_routing)
            if pieces is not None and routing_weights is not None:
                permutation, expert_offsets = layer.tensors["permutation"], deal.expert_offsets
                grad_routing = grad_of_routing_weights(
                    pieces.sum(0), problem, grad_y, inputs.down_bias, permutation, expert_offsets
                )
        elif need_routing and routing_weights is not None:
            grad_routing = torch.zeros_like(routing_weights)
        if grads[0] is not None:
            grads[0] = sum_of_choices(grads[0], problem.top_k)
    return problem.gradients((*grads, grad_routing))


@functools.cache
def warn_once_of_copies() -> None:
    warnings.warn(
        "weights of experts are copied in each call, because their addresses are no multiples of 16 bytes, as in a "
        "flat buffer behind a parameter of odd size: pad the buffer",
        stacklevel=2,
    )


def _form(layer: Layer) -> str:
    """ "single", "split" or "onchip": what the backend names, or what is best."""
    problem, backend = layer.problem, layer.problem.backend
    check_sizes(problem)
    _, _, form = backend.partition("-")
    fits = layer.onchip_tile() is not None
    if form == "onchip" and not fits:
        raise ValueError(
            f"backend={backend!r} is for 16-bit types and small d_model, got {problem.dtype} and {problem.d_model}: "
            "use backend='triton'"
        )
    if form:
        return form
    if problem.pre_format is not None:
        return "split"  # whose kernels have registers for it
    entry = forms.nearest_to(problem)
    among = ("single", "split", "onchip") if fits else ("single", "split")
    fastest = None if entry is None else entry.fastest("forward", among)
    return fastest or ("onchip" if fits else "single")
