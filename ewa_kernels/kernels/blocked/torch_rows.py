"""What is done to a block of grouped rows, in PyTorch calls, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ewa_kernels.kernels.blocked.blocks import Block
from ewa_kernels.kernels.scratch import Scratch
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
    """Of hidden."""

    seed: int | Tensor
    p: float

    def seed_on(self, device: torch.device) -> Tensor:
        if isinstance(self.seed, Tensor):
            return self.seed.to(device)
        return torch.full((), self.seed, dtype=torch.int64, device=device)


class TorchRows:
    """The parts of a layer's forward and backward, for a block at a time whose experts have n rows each.

    Rows are `[e, n, …]`, contiguous, of `dtype`, in which matrix products are made, and in scratch memory. Tensors of
    tokens, and what is kept for backward, may be of another dtype. Biases, factors `[e · n]`, by which rows are
    multiplied, and dropout may be None.
    """

    def __init__(self, activation: str, gated: bool, dtype: torch.dtype, scratch: Scratch):
        self.activation = activation
        self.gated = gated
        self.dtype = dtype
        self.scratch = scratch

    @property
    def sums_in_16_bits(self) -> bool:
        """Whether gradients would be rounded after each block that is added to them."""
        return self.dtype.itemsize == 2

    # For the layer, with the parameters of all experts, in the same dtype.

    def look_up(self, block: Block, x: Tensor, name: str) -> Tensor:
        """x[tokens]."""
        out = self._new(block, name, x.shape[1])
        self.gather(x, block.tokens, out)
        return out

    def scaled(self, block: Block, x: Tensor, factor: Tensor) -> Tensor:
        """x · factor, of what was looked up, which is used up."""
        return x.mul_(factor.view(*x.shape[:2], 1))

    def up(
        self,
        block: Block,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dropout: Dropout | None,
        pre: Tensor | None,
    ) -> Tensor:
        """hidden = dropout(act(pre)) for pre = x @ weightᵀ + bias, which is kept if it is given, `[rows, columns]`."""
        num_up = weight.shape[1]
        if pre is not None:
            pre = pre.view(len(block.counts), block.counts[0], num_up)
        product = pre if pre is not None and pre.dtype == self.dtype else self._new(block, "pre", num_up)
        bias = self._linear(block, x, weight, bias, product)
        hidden = self._new(block, "hidden", self._d_ff(num_up))
        self.activate(product, bias, block.rows, dropout, pre, hidden)
        return hidden

    def down(
        self, block: Block, hidden: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor | None, y: Tensor
    ) -> None:
        """y[choices] = (hidden @ weightᵀ + bias) · factor."""
        product = self._new(block, "y", weight.shape[1])
        bias = self._linear(block, hidden, weight, bias, product)
        self.scatter(product, bias, factor, block.choices, y)

    def pre_activation(self, block: Block, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x @ weightᵀ + bias, `[rows, columns]`."""
        pre = self._new(block, "pre", weight.shape[1])
        bias = self._linear(block, x, weight, bias, pre)
        if bias is not None:
            pre += bias.unsqueeze(1)
        return pre.flatten(0, 1)

    def hidden_again(self, block: Block, pre: Tensor, dropout: Dropout | None) -> Tensor:
        """From pre `[rows, columns]`."""
        hidden = self._new(block, "hidden", self._d_ff(pre.shape[1]))
        self.activate(pre.view(*hidden.shape[:2], pre.shape[1]), None, block.rows, dropout, None, hidden)
        return hidden

    def down_backward(
        self,
        block: Block,
        grad_y: Tensor,
        weight: Tensor,
        pre: Tensor,
        dropout: Dropout | None,
        factor: Tensor | None,
        grad_factor: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """grad_pre, and hidden once more, from pre `[rows, columns]`; grad_factor, if it is given, is filled with
        grad_hidden · hidden, row by row."""
        grad_hidden = self._new(block, "grad_hidden", weight.shape[2])
        self.multiply(grad_y, block.of(weight), None, grad_hidden)
        in_place = factor is None and not self.gated
        grad_pre = grad_hidden if in_place else self._new(block, "grad_pre", pre.shape[1])
        hidden = self._new(block, "hidden", weight.shape[2])
        pre = pre.view(*hidden.shape[:2], pre.shape[1])
        self.activate_backward(pre, grad_hidden, block.rows, dropout, factor, grad_pre, hidden, grad_factor)
        return grad_pre, hidden

    def weight_gradient(
        self, block: Block, left: Tensor, right: Tensor | None, grad: Tensor | None, grad_bias: Tensor | None
    ) -> None:
        """grad = beta · grad + leftᵀ @ right, `[e, left's columns, right's]`; grad_bias = beta · grad_bias + the sum of
        left over rows. Without `grad` there need be no `right`."""
        if grad is not None and right is not None:
            block.of(grad).baddbmm_(left.mT, right, beta=block.beta)
        if grad_bias is not None and block.beta == 0:
            torch.sum(left, 1, out=block.of(grad_bias))
        elif grad_bias is not None:
            block.of(grad_bias).add_(left.sum(1))

    def up_backward(self, block: Block, grad_pre: Tensor, weight: Tensor, grad_x: Tensor) -> None:
        """grad_x[choices] = grad_pre @ weight."""
        product = self._new(block, "y", weight.shape[2])
        self.multiply(grad_pre, block.of(weight), None, product)
        self.scatter(product, None, None, block.choices, grad_x)

    def _linear(self, block: Block, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor | None:
        """out = x @ weightᵀ + bias; returns the bias if that is still to be added."""
        return self.multiply(x, block.of(weight).mT, None if bias is None else block.of(bias), out)

    def _d_ff(self, num_up: int) -> int:
        return num_up // (2 if self.gated else 1)

    def _new(self, block: Block, name: str, columns: int) -> Tensor:
        return self.scratch(name, len(block.counts), block.counts[0], columns)

    # What the above is made of: `[e, n, …]` in, `out` filled.

    def gather(self, x: Tensor, tokens: Tensor, out: Tensor) -> None:
        """out = x[tokens]."""
        torch.index_select(x, 0, tokens, out=out.flatten(0, 1))

    def multiply(self, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> Tensor | None:
        """out = a @ b + bias; returns the bias if that is still to be added."""
        if bias is None:
            torch.bmm(a, b, out=out)
        else:
            torch.baddbmm(bias.unsqueeze(1), a, b, out=out)
        return None

    def scatter(self, block: Tensor, bias: Tensor | None, factor: Tensor | None, tokens: Tensor, out: Tensor) -> None:
        """out[tokens] = (block + bias) · factor; the block is used up."""
        assert bias is None, "added by multiply"
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
        assert bias is None, "added by multiply"
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
        """grad_pre from grad_hidden · factor, hidden once more, and grad_factor, see `down_backward`.

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
        scale = dropout_scale(rows, hidden.shape[-1], dropout.seed_on(rows.device), dropout.p, hidden.dtype)
        return scale.view(hidden.shape)
