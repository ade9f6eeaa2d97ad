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
from ewa_kernels.kernels.triton.backward import launch_backward
from ewa_kernels.kernels.triton.configs import aligned
from ewa_kernels.kernels.triton.forward import launch_forward
from ewa_kernels.kernels.triton.layer import Layer, check_sizes
from ewa_kernels.kernels.triton.onchip import launch_onchip
from ewa_kernels.problem import Problem

_NOTHING = contextlib.nullcontext()


def parameters(
    problem: Problem, up_weight: Tensor, up_bias: Tensor | None, down_weight: Tensor, down_bias: Tensor | None
) -> list[Tensor | None]:
    """As the kernels read them: contiguous and aligned, weights in x's dtype. Biases keep theirs."""
    up_weight, down_weight = (in_dtype(weight, problem.dtype).contiguous() for weight in (up_weight, down_weight))
    if up_weight.data_ptr() % 16 or down_weight.data_ptr() % 16:
        _warn_once_of_copies()
    up_bias, down_bias = (None if bias is None else aligned(bias.contiguous()) for bias in (up_bias, down_bias))
    return [aligned(up_weight), up_bias, aligned(down_weight), down_bias]


def forward(
    problem: Problem,
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    routing_weights: Tensor | None,
    seed: int | Tensor | None,
    permutation: Tensor | None,
    expert_offsets: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y [T, D], pre_activation [R, F or 2F], by grouped row, or None unless it is saved, and the permutation [R]."""
    layer = Layer(problem, seed, expert_offsets, routing_weights)
    form = layer.kept("form", lambda: _form(layer))
    with on_device(x):
        x = aligned(x.contiguous())
        y = x.new_empty(layer.num_rows, layer.d_model)
        pre_activation = x.new_empty(layer.num_rows, problem.num_up) if problem.save else None
        deal = permutation is None
        if permutation is None:
            permutation = torch.empty(layer.num_rows, dtype=torch.int32, device=x.device)
        else:
            permutation = aligned(permutation)
        operands = (x, up_weight, up_bias, down_weight, down_bias)
        if layer.num_rows > 0:
            if form == "onchip":
                launch_onchip(layer, *operands, y, pre_activation, permutation, deal=deal)
            else:
                hidden = x.new_empty(layer.num_rows, layer.d_ff)
                for step in ("up", "down") if form == "split" else ("single",):
                    launch_forward(layer, *operands, y, pre_activation, hidden, permutation, form=step, deal=deal)
    return sum_of_choices(y, layer.top_k), pre_activation, permutation


def backward(
    problem: Problem,
    grad_y: Tensor,
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    routing_weights: Tensor | None,
    seed: int | Tensor | None,
    permutation: Tensor | None,
    expert_offsets: Tensor | None,
    pre_activation: Tensor | None,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, the parameters and the routing weights, None where not needed.

    Without `pre_activation` it is computed again, in a launch of its own, and so is a permutation that is not given.
    """
    layer = Layer(problem, seed, expert_offsets, routing_weights)
    form = layer.kept("form", lambda: _form(layer))
    inputs = (x, up_weight, up_bias, down_weight, down_bias)
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
        shapes = [(layer.num_rows, layer.d_model), *(() if t is None else t.shape for t in inputs[1:])]
        grads = [
            new(shape, dtype=dtype, device=x.device) if t is not None and need else None
            for t, shape, dtype, need in zip(inputs, shapes, dtypes, needed, strict=True)
        ]
        if layer.num_rows > 0 and (need_routing or any(needed)):
            x, grad_y = aligned(x.contiguous()), aligned(grad_y.contiguous())
            deal = permutation is None
            if permutation is None:
                permutation = torch.empty(layer.num_rows, dtype=torch.int32, device=x.device)
            permutation = aligned(permutation)
            if pre_activation is None:
                pre_activation = x.new_empty(layer.num_rows, problem.num_up)
                operands = (x, up_weight, up_bias, down_weight, down_bias)
                launch_forward(layer, *operands, None, pre_activation, None, permutation, form="up", deal=deal)
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
                single=form != "split",
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
    return tuple(
        g if g is None or g.dtype == to else g.to(to)
        for g, to in zip((*grads, grad_routing), problem.input_dtypes, strict=True)
    )


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
