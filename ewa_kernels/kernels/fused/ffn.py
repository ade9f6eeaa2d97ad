"""The layer's forward and backward by Triton kernels: what is allocated, which kernels are launched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ewa_kernels.kernels.copies import in_dtype
from ewa_kernels.kernels.fused.backward import launch_backward
from ewa_kernels.kernels.fused.forward import launch_forward
from ewa_kernels.kernels.fused.layer import Layer
from ewa_kernels.kernels.fused.onchip import launch_onchip


def moe_ffn_forward(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    seed: Tensor,
    permutation: Tensor | None,
    expert_offsets: Tensor | None,
    activation: str,
    gated: bool,
    dropout_p: float,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y [T, D], pre_activation [T, F or 2F], by grouped row, and the permutation drawn, int32 [T].

    The last two are [0] unless `save`, and the permutation also if it was given.
    """
    layer = Layer.of(x, down_weight, seed, expert_offsets, activation, gated, dropout_p)
    form = _form(layer, backend)
    deal = permutation is None
    with torch.cuda.device_of(x):
        operands = _operands(x, up_weight, up_bias, down_weight, down_bias)
        y = x.new_empty(x.shape)
        pre_activation = x.new_empty((layer.num_tokens, up_weight.shape[1]) if save else 0)
        if permutation is None:
            permutation = torch.empty(layer.num_tokens, dtype=torch.int32, device=x.device)
        if layer.num_tokens > 0:
            saved = pre_activation if save else None
            if form == "onchip":
                launch_onchip(layer, *operands, y, saved, permutation, deal=deal)
            else:
                hidden = x.new_empty(layer.num_tokens, layer.d_ff)
                for step in ("up", "down") if form == "split" else ("single",):
                    launch_forward(layer, *operands, y, saved, hidden, permutation, form=step, deal=deal)
    return y, pre_activation, permutation if save and deal else permutation.new_empty(0)


def moe_ffn_backward(
    grad_y: Tensor,
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    seed: Tensor,
    permutation: Tensor,
    expert_offsets: Tensor | None,
    pre_activation: Tensor,
    activation: str,
    gated: bool,
    dropout_p: float,
    output_mask: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    """Gradients of x, up_weight, up_bias, down_weight and down_bias; [0] where `output_mask` is False.

    Without `pre_activation` it is computed again, in a launch of its own, and so is the permutation.
    """
    layer = Layer.of(x, down_weight, seed, expert_offsets, activation, gated, dropout_p)
    form = _form(layer, backend)
    inputs = (x, up_weight, up_bias, down_weight, down_bias)
    dtypes = [None if t is None else t.dtype for t in inputs]
    # One kernel writes both weights' gradients, to one type.
    dtypes[1] = dtypes[3] = torch.promote_types(up_weight.dtype, down_weight.dtype)
    with torch.cuda.device_of(x):
        # Nothing is launched for no tokens.
        new = torch.empty if layer.num_tokens > 0 else torch.zeros
        grads = [
            new(t.shape, dtype=dtype, device=x.device) if t is not None and needed else None
            for t, dtype, needed in zip(inputs, dtypes, output_mask, strict=True)
        ]
        if layer.num_tokens > 0 and any(output_mask):
            x, up_weight, up_bias, down_weight, _ = operands = _operands(*inputs)
            if len(pre_activation) == 0:
                deal = len(permutation) == 0
                pre_activation = x.new_empty(layer.num_tokens, up_weight.shape[1])
                permutation = torch.empty(layer.num_tokens, dtype=torch.int32, device=x.device) if deal else permutation
                launch_forward(layer, *operands, None, pre_activation, None, permutation, form="up", deal=deal)
            launch_backward(
                layer,
                grad_y.contiguous(),
                x,
                up_weight,
                down_weight,
                pre_activation,
                permutation,
                *grads,
                single=form != "split",
            )
    return tuple(
        (x if t is None else t).new_empty(0) if t is None or grad is None else grad.to(t.dtype)
        for t, grad in zip(inputs, grads, strict=True)
    )


def _operands(
    x: Tensor, up_weight: Tensor, up_bias: Tensor | None, down_weight: Tensor, down_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """What the kernels read: contiguous, the weights in x's dtype. Biases keep theirs."""
    biases = (None if bias is None else bias.contiguous() for bias in (up_bias, down_bias))
    up, down = (in_dtype(weight, x.dtype).contiguous() for weight in (up_weight, down_weight))
    up_bias, down_bias = biases
    return x.contiguous(), up, up_bias, down, down_bias


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
