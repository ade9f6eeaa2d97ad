"""What is done to a block of grouped rows, in PyTorch calls, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...reference import dropout_scale
from ..scratch import Scratch
from .blocks import Block

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
    """Of hidden."""

    seed: int | Tensor
    p: float


class TorchRows:
    """What is done to a block of rows of e experts, n rows each: `[e, n, …]` in, `out` filled.

    Rows are contiguous, of `dtype`, in which matrix products are made, and in scratch memory. Tensors of tokens, and
    what is kept for backward, may be of another dtype. Biases, factors `[e · n]`, by which rows are multiplied, and
    dropout may be None.
    """

    def __init__(self, activation: str, gated: bool, dtype: torch.dtype, scratch: Scratch):
        self.activation = activation
        self.gated = gated
        self.dtype = dtype
        self.scratch = scratch

    def new(self, block: Block, name: str, columns: int) -> Tensor:
        """`[e, n, columns]`, of what was called so in the block before."""
        return self.scratch(name, len(block.counts), block.counts[0], columns)

    def look_up(self, block: Block, x: Tensor, name: str) -> Tensor:
        """x[tokens]."""
        out = self.new(block, name, x.shape[1])
        torch.index_select(x, 0, block.tokens, out=out.flatten(0, 1))
        return out

    def linear(self, block: Block, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor | None:
        """out = x @ weightᵀ + bias, by all experts' parameters; returns the bias if that is still to be added."""
        if bias is None:
            torch.bmm(x, block.of(weight).mT, out=out)
        else:
            torch.baddbmm(block.of(bias).unsqueeze(1), x, block.of(weight).mT, out=out)
        return None

    def scatter(self, block: Tensor, bias: Tensor | None, factor: Tensor | None, tokens: Tensor, out: Tensor) -> None:
        """out[tokens] = (block + bias) · factor; the block is used up."""
        assert bias is None, "added by linear"
        if factor is not None:
            block.mul_(factor.view(*block.shape[:2], 1))
        out[tokens] = block.flatten(0, 1)

    def activate(
        self,
        product: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        dropout: Dropout | None,
        pre: Tensor | None,
        hidden: Tensor,
    ) -> None:
        """pre = product + bias, unless it is None, and in place if it is product; hidden = dropout(act(pre)), or of
        act(gate) · value."""
        assert bias is None, "added by linear"
        d_ff = hidden.shape[-1]
        ACTIVATIONS[self.activation].forward(product[..., :d_ff], hidden)
        if self.gated:
            hidden.mul_(product[..., d_ff:])
        if dropout is not None:
            hidden.mul_(self._dropout_scale(rows, dropout, hidden))

    def activate_backward(
        self,
        pre: Tensor,
        grad_hidden: Tensor,
        rows: Tensor,
        dropout: Dropout | None,
        factor: Tensor | None,
        grad_pre: Tensor,
        hidden: Tensor,
        grad_factor: Tensor | None,
    ) -> None:
        """grad_pre from grad_hidden · factor, hidden once more, and grad_factor = grad_hidden · hidden, row by row,
        unless it is None.

        grad_hidden is used up: with neither a factor nor a gate it may be grad_pre too.
        """
        d_ff = hidden.shape[-1]
        gate, value = pre[..., :d_ff], pre[..., d_ff:]
        act = ACTIVATIONS[self.activation]
        act.forward(gate, hidden)
        scale = None if dropout is None else self._dropout_scale(rows, dropout, hidden)
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

    def _dropout_scale(self, rows: Tensor, dropout: Dropout, hidden: Tensor) -> Tensor:
        seed = dropout.seed
        if not isinstance(seed, Tensor):  # filled, not copied from the host: a CUDA graph may be captured
            seed = torch.full((), seed, dtype=torch.int64, device=rows.device)
        scale = dropout_scale(rows, hidden.shape[-1], seed.to(rows.device), dropout.p, hidden.dtype)
        return scale.view(hidden.shape)
