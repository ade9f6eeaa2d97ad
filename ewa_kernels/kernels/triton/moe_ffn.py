"""The layer's forward and backward by Triton kernels: what is allocated, which kernels are launched."""

from __future__ import annotations

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
from ewa_kernels.kernels.triton.layer import Layer
from ewa_kernels.kernels.triton.onchip import launch_onchip


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
    """Returns y [T, D], pre_activation [T·k, F or 2F], by grouped row, and the permutation drawn, int32 [T].

    The last two are [0] unless `save`, and the permutation also if it was given.
    """
    layer = Layer.of(x, down_weight, routing_weights, seed, expert_offsets, activation, gated, dropout_p)
    form = _form(layer, backend)
    deal = permutation is None
    with torch.cuda.device_of(x):
        operands = _operands(x, up_weight, up_bias, down_weight, down_bias)
        y = x.new_empty(layer.num_rows, layer.d_model)
        pre_activation = x.new_empty((layer.num_rows, up_weight.shape[1]) if save else 0)
        if permutation is None:
            permutation = torch.empty(layer.num_rows, dtype=torch.int32, device=x.device)
        else:
            permutation = aligned(permutation)
        if layer.num_rows > 0:
            saved = pre_activation if save else None
            if form == "onchip":
                launch_onchip(layer, *operands, y, saved, permutation, deal=deal)
            else:
                hidden = x.new_empty(layer.num_rows, layer.d_ff)
                for step in ("up", "down") if form == "split" else ("single",):
                    launch_forward(layer, *operands, y, saved, hidden, permutation, form=step, deal=deal)
    return sum_of_choices(y, layer.top_k), pre_activation, permutation if save and deal else permutation.new_empty(0)


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

    Without `pre_activation` it is computed again, in a launch of its own, and so is the permutation.
    """
    layer = Layer.of(x, down_weight, routing_weights, seed, expert_offsets, activation, gated, dropout_p)
    form = _form(layer, backend)
    inputs = (x, up_weight, up_bias, down_weight, down_bias)
    dtypes = [None if t is None else t.dtype for t in inputs]
    *output_mask, need_routing = output_mask
    grad_routing = x.new_empty(0) if need_routing else None
    # One kernel writes both weights' gradients, to one type.
    dtypes[1] = dtypes[3] = torch.promote_types(up_weight.dtype, down_weight.dtype)
    with torch.cuda.device_of(x):
        # Nothing is launched for no tokens.
        new = torch.empty if layer.num_rows > 0 else torch.zeros
        shapes = [(layer.num_rows, layer.d_model), *(() if t is None else t.shape for t in inputs[1:])]
        grads = [
            new(shape, dtype=dtype, device=x.device) if t is not None and needed else None
            for t, shape, dtype, needed in zip(inputs, shapes, dtypes, output_mask, strict=True)
        ]
        if layer.num_rows > 0 and (need_routing or any(output_mask)):
            x, up_weight, up_bias, down_weight, _ = operands = _operands(*inputs)
            grad_y = aligned(grad_y.contiguous())
            permutation, pre_activation = aligned(permutation), aligned(pre_activation)
            if len(pre_activation) == 0:
                deal = len(permutation) == 0
                pre_activation = x.new_empty(layer.num_rows, up_weight.shape[1])
                permutation = torch.empty(layer.num_rows, dtype=torch.int32, device=x.device) if deal else permutation
                launch_forward(layer, *operands, None, pre_activation, None, permutation, form="up", deal=deal)
            pieces = launch_backward(
                layer,
                grad_y,
                x,
                up_weight,
                down_weight,
                pre_activation,
                permutation,
                *grads,
                need_routing=need_routing,
                single=backend == "triton-single" or not (form == "split" or split_is_faster(layer)),
            )
            if pieces is not None:
                grad_routing = pieces.sum(0)
                if down_bias is not None and expert_offsets is not None:
                    grad_routing += grad_of_bias_factor(grad_y, down_bias, permutation, expert_offsets, layer.top_k)
                grad_routing = torch.empty_like(grad_routing).index_copy_(0, existing(permutation), grad_routing)
        if grads[0] is not None:
            grads[0] = sum_of_choices(grads[0], layer.top_k)
    return tuple(
        (x if t is None else t).new_empty(0) if t is None or grad is None else grad.to(t.dtype).view(t.shape)
        for t, grad in zip((*inputs, routing_weights), (*grads, grad_routing), strict=True)
    )


def _operands(
    x: Tensor, up_weight: Tensor, up_bias: Tensor | None, down_weight: Tensor, down_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """What the kernels read: contiguous and aligned, the weights in x's dtype. Biases keep theirs."""
    up_bias, down_bias = (None if bias is None else aligned(bias.contiguous()) for bias in (up_bias, down_bias))
    up, down = (in_dtype(weight, x.dtype).contiguous() for weight in (up_weight, down_weight))
    if up.data_ptr() % 16 or down.data_ptr() % 16:
        _warn_once_of_copies()
    return aligned(x.contiguous()), aligned(up), up_bias, aligned(down), down_bias


@functools.cache
def _warn_once_of_copies() -> None:
    warnings.warn(
        "weights of experts are copied in each call, because their addresses are no multiples of 16 bytes, as in a "
        "flat buffer behind a parameter of odd size: pad the buffer",
        stacklevel=2,
    )


def _form(layer: Layer, backend: str) -> str:
    """ "single", "split" or "onchip": what the backend names, or what is best."""
    _, _, form = backend.partition("-")
    fits = layer.onchip_tile() is not None
    if form == "onchip" and not fits:
        raise ValueError(
            f"backend={backend!r} is for 16-bit types and small d_model, got {layer.dtype} and {layer.d_model}: "
            "use backend='triton'"
        )
    return form or ("onchip" if fits else "single")
