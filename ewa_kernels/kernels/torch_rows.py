"""What is done to a block of grouped rows between matrix products, in PyTorch calls, on any device.

A block has e experts and n rows of each: tensors are `[e, n, …]`, contiguous, and written into, never made here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ewa_kernels.reference import dropout_scale

aten = torch.ops.aten


class _Activation(NamedTuple):
    """`forward(pre, out)` gives act(pre), `backward(grad, pre, out)` grad · act'(pre), where `out` may be `grad`; both
    fill and return `out`."""

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


def _gelu(approximate: str) -> _Activation:
    return _Activation(
        lambda pre, out: aten.gelu.out(pre, approximate=approximate, out=out),
        lambda grad, pre, out: aten.gelu_backward.grad_input(grad, pre, approximate=approximate, grad_input=out),
    )


ACTIVATIONS = {
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "quick_gelu": _Activation(
        lambda pre, out: torch.mul(pre, 1.702, out=out).sigmoid_().mul_(pre),
        # Its derivative is that of SiLU at 1.702 · pre, which float16 cannot always hold.
        lambda grad, pre, out: aten.silu_backward.grad_input(
            grad, torch.mul(pre, 1.702).clamp_(-1e4, 1e4), grad_input=out
        ),
    ),
    "relu": _Activation(
        lambda pre, out: torch.clamp_min(pre, 0, out=out),
        lambda grad, pre, out: aten.threshold_backward.grad_input(grad, pre, 0, grad_input=out),
    ),
    "relu2": _Activation(
        lambda pre, out: torch.clamp_min(pre, 0, out=out).square_(),
        lambda grad, pre, out: torch.mul(grad, pre.clamp_min(0), out=out).mul_(2),
    ),
    "silu": _Activation(
        lambda pre, out: aten.silu.out(pre, out=out),
        lambda grad, pre, out: aten.silu_backward.grad_input(grad, pre, grad_input=out),
    ),
    "identity": _Activation(lambda pre, out: out.copy_(pre), lambda grad, pre, out: out.copy_(grad)),
}


class Dropout(NamedTuple):
    """Of a block of hidden: `rows` `[e, n]`, int64, are grouped rows; the seed is on their device."""

    rows: Tensor
    seed: Tensor
    p: float

    def scale(self, hidden: Tensor) -> Tensor:
        """What hidden is multiplied by."""
        return dropout_scale(self.rows, hidden.shape[-1], self.seed, self.p, hidden.dtype)


class TorchRows:
    """Biases are `[e, …]` or None, and so is what is dropped.

    A block is of `dtype`, in which matrix products are made. Tensors of tokens, and what is kept for backward, may be
    of another dtype.
    """

    def __init__(self, activation: str, gated: bool, dtype: torch.dtype):
        self.activation = activation
        self.gated = gated
        self.dtype = dtype

    def gather(self, x: Tensor, tokens: Tensor, out: Tensor) -> None:
        """out = x[tokens], `[T, D]` → `[e, n, D]`."""
        torch.index_select(x, 0, tokens, out=out.flatten(0, 1))

    def scatter(self, block: Tensor, tokens: Tensor, out: Tensor) -> None:
        """out[tokens] = block, `[e, n, D]` → `[T, D]`."""
        out[tokens] = block.flatten(0, 1)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out = x @ weightᵀ + bias."""
        if bias is None:
            torch.bmm(x, weight.mT, out=out)
        else:
            torch.baddbmm(bias.unsqueeze(1), x, weight.mT, out=out)

    def up_and_activate(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dropout: Dropout | None,
        product: Tensor,
        pre: Tensor | None,
        hidden: Tensor,
    ) -> None:
        """pre = x @ weightᵀ + bias, by way of `product`, which it may be, or None; hidden = dropout(act(pre))."""
        self.linear(x, weight, bias, product)
        self.activate(product, dropout, hidden)

    def down_and_scatter(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        factor: Tensor | None,
        choices: Tensor,
        product: Tensor,
        y: Tensor,
    ) -> None:
        """y[choices] = (hidden @ weightᵀ + bias) · factor, by way of `product`; factor `[e · n]` or None."""
        self.linear(hidden, weight, bias, product)
        if factor is not None:
            product.mul_(factor.view(*product.shape[:2], 1))
        self.scatter(product, choices, y)

    def activate(self, pre: Tensor, dropout: Dropout | None, hidden: Tensor) -> None:
        """hidden = dropout(act(pre)), or of act(gate) · value."""
        d_ff = hidden.shape[-1]
        ACTIVATIONS[self.activation].forward(pre[..., :d_ff], hidden)
        if self.gated:
            hidden.mul_(pre[..., d_ff:])
        if dropout is not None:
            hidden.mul_(dropout.scale(hidden))

    def activate_backward(
        self,
        pre: Tensor,
        grad_hidden: Tensor,
        dropout: Dropout | None,
        factor: Tensor | None,
        grad_pre: Tensor,
        hidden: Tensor,
        grad_factor: Tensor | None,
        grad_bias: Tensor | None,
        beta: int,
    ) -> None:
        """grad_pre from grad_hidden · factor, and hidden once more; grad_bias = beta · grad_bias + its sum.

        grad_hidden is used up: with neither a factor nor a gate it may be grad_pre too. factor is `[e · n]`, and
        grad_factor, alike, becomes what grad_hidden · hidden is row by row.
        """
        d_ff = hidden.shape[-1]
        gate, value = pre[..., :d_ff], pre[..., d_ff:]
        act = ACTIVATIONS[self.activation]
        act.forward(gate, hidden)
        scale = None if dropout is None else dropout.scale(hidden)
        if grad_factor is not None:
            kept = hidden if scale is None else hidden * scale
            terms = kept * value if self.gated else kept
            torch.linalg.vecdot(grad_hidden, terms, out=grad_factor.view(hidden.shape[:2]))
        if factor is not None:
            grad_hidden.mul_(factor.view(*hidden.shape[:2], 1))
        if scale is not None:
            grad_hidden.mul_(scale)
        if self.gated:
            torch.mul(grad_hidden, hidden, out=grad_pre[..., d_ff:])
            grad_hidden.mul_(value)
            hidden.mul_(value)
        if scale is not None:
            hidden.mul_(scale)
        act.backward(grad_hidden, gate, grad_pre[..., :d_ff])
        if grad_bias is not None:
            self.add_sum(grad_pre, grad_bias, beta)

    def add_sum(self, block: Tensor, total: Tensor, beta: int) -> None:
        """total = beta · total + the sum over rows, `[e, n, c]` → `[e, c]`."""
        if beta == 0:
            torch.sum(block, 1, out=total)
        else:
            total += block.sum(1)
