"""The operations as `torch.library` sees them: schema, implementation, fake tensors, autograd.

Arguments are validated in `ewa_kernels.functional`, once; shapes and dtypes are taken for granted here.
A seed is always an int64 tensor with one element, on the CPU or on the device of the tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ewa_kernels import reference
from ewa_kernels.kernels import blocked_ffn, cpp_rows

_LIBRARY = torch.library.Library("ewa_kernels", "DEF")


def _define(schema: str, implementation: Any, fake: Any, tags: tuple[torch.Tag, ...] = ()) -> Any:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ewa_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.ewa_kernels, name).default


# --- the deal ---


def _random_permutation(num_tokens: int, seed: Tensor) -> Tensor:
    if seed.device.type == "cpu" and cpp_rows.WHY_NOT is None:
        return cpp_rows.random_permutation(num_tokens, seed)
    return reference.random_permutation(num_tokens, seed)


random_permutation = _define(
    "random_permutation(SymInt num_tokens, Tensor seed) -> Tensor",
    _random_permutation,
    lambda num_tokens, seed: seed.new_empty(num_tokens, dtype=torch.int32),
)


def _draw_seed(like: Tensor) -> Tensor:
    # `high` is exclusive and at most the largest int64, so 2^63 − 1 alone is never drawn.
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=like.device)


# An operation of its own, so that a compiled model draws the very seed that the eager model draws, and so
# that the compiler, which may recompute a torch.randint in backward, sees one random value and keeps it.
draw_seed = _define(
    "draw_seed(Tensor like) -> Tensor",
    _draw_seed,
    lambda like: like.new_empty((), dtype=torch.int64),
    tags=(torch.Tag.nondeterministic_seeded,),
)


# --- moe_ffn ---

_FFN_ARGUMENTS = (
    "Tensor x, Tensor up_weight, Tensor? up_bias, Tensor down_weight, Tensor? down_bias, Tensor seed, "
    "str activation, bool gated, float dropout_p"
)


def _forward_fake(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    seed: Tensor,
    activation: str,
    gated: bool,
    dropout_p: float,
    save_pre_activation: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens = x.shape[0]
    return (
        x.new_empty(num_tokens, down_weight.shape[1]),
        x.new_empty((num_tokens, up_weight.shape[1]) if save_pre_activation else 0),
        x.new_empty(num_tokens, dtype=torch.int32),
    )


def _backward_fake(
    grad_y: Tensor,
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    seed: Tensor,
    pre_activation: Tensor,
    permutation: Tensor,
    activation: str,
    gated: bool,
    dropout_p: float,
    output_mask: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    shapes = (
        x.shape,
        up_weight.shape,
        up_weight.shape[:2],
        down_weight.shape,
        down_weight.shape[:2],
    )
    return tuple(x.new_empty(shape if needed else 0) for shape, needed in zip(shapes, output_mask, strict=True))


moe_ffn = _define(
    f"moe_ffn({_FFN_ARGUMENTS}, bool save_pre_activation, str backend) "
    "-> (Tensor y, Tensor pre_activation, Tensor permutation)",
    blocked_ffn.moe_ffn_forward,
    _forward_fake,
)
moe_ffn_backward = _define(
    "moe_ffn_backward(Tensor grad_y, Tensor x, Tensor up_weight, Tensor? up_bias, Tensor down_weight, "
    "Tensor seed, Tensor pre_activation, Tensor permutation, str activation, bool gated, float dropout_p, "
    "bool[] output_mask, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    blocked_ffn.moe_ffn_backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, up_weight, up_bias, down_weight, _, seed, activation, gated, dropout_p, _, backend = inputs
    _, pre_activation, permutation = output
    ctx.mark_non_differentiable(pre_activation, permutation)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, up_weight, up_bias, down_weight, seed, pre_activation, permutation)
    ctx.options = (activation, gated, dropout_p)
    ctx.backend = backend


def _backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    mask = list(ctx.needs_input_grad[:5])
    if grad_y is None:
        return (None,) * 11
    grads = moe_ffn_backward(grad_y, *ctx.saved_tensors, *ctx.options, mask, ctx.backend)
    needed = (grad if need else None for grad, need in zip(grads, mask, strict=True))
    return (*needed, *itertools.repeat(None, 6))


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError('moe_ffn has no second derivative: use backend="reference", which has, if you need one')


torch.library.register_autograd("ewa_kernels::moe_ffn", _backward, setup_context=_setup_context, lib=_LIBRARY)
torch.library.register_autograd("ewa_kernels::moe_ffn_backward", _no_second_derivative, lib=_LIBRARY)


# --- average_experts_ ---


def _average_experts_(tensors: Sequence[Tensor], group_sizes: Sequence[int], share_rate: Tensor) -> None:
    remaining = iter(tensors)
    groups = [next(remaining) if size == 0 else list(itertools.islice(remaining, size)) for size in group_sizes]
    reference.average_experts_(groups, share_rate)


# Group g is one stacked tensor [E, ...] if group_sizes[g] is 0, else the next group_sizes[g] tensors.
average_experts_ = _define(
    "average_experts_(Tensor(a!)[] tensors, int[] group_sizes, Tensor share_rate) -> ()",
    _average_experts_,
    lambda tensors, group_sizes, share_rate: None,
)
