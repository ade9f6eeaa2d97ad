"""The layer's forward and backward in PyTorch calls on any device, block by block of grouped rows.

All experts advance in lockstep, so that each product is one batched call. A block goes through gather, both
projections and scatter before the next one starts: `hidden` as a whole is never stored, and for backward
only `pre_activation` is kept, or nothing at all, in which case it is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ewa_kernels.reference import dropout_scale, expert_offsets, random_permutation

aten = torch.ops.aten

# Rows of all experts together in a block: enough for the products to run at full speed, few enough for the
# scratch memory to stay small.
BLOCK_ROWS = 2048


class _Activation(NamedTuple):
    """`forward(pre, out)` gives act(pre), `backward(grad, pre, out)` grad · act'(pre); both fill and return `out`."""

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


def _gelu(approximate: str) -> _Activation:
    return _Activation(
        lambda pre, out: aten.gelu.out(pre, approximate=approximate, out=out),
        lambda grad, pre, out: aten.gelu_backward.grad_input(grad, pre, approximate=approximate, grad_input=out),
    )


_ACTIVATIONS = {
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "relu": _Activation(
        lambda pre, out: torch.clamp_min(pre, 0, out=out),
        lambda grad, pre, out: aten.threshold_backward.grad_input(grad, pre, 0, grad_input=out),
    ),
    "relu2": _Activation(
        lambda pre, out: torch.clamp_min(pre, 0, out=out).square_(),
        lambda grad, pre, out: torch.clamp_min(pre, 0, out=out).mul_(grad).mul_(2),
    ),
    "silu": _Activation(
        lambda pre, out: aten.silu.out(pre, out=out),
        lambda grad, pre, out: aten.silu_backward.grad_input(grad, pre, grad_input=out),
    ),
    "identity": _Activation(lambda pre, out: out.copy_(pre), lambda grad, pre, out: out.copy_(grad)),
}


class _Buffers:
    """Scratch memory that all blocks share: fresh memory can cost more than the arithmetic done in it."""

    def __init__(self, like: Tensor):
        self._like = like
        self._memory: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self._memory or len(self._memory[name]) < size:
            self._memory[name] = self._like.new_empty(size)
        return self._memory[name][:size].view(shape)


class _Block(NamedTuple):
    """`n` rows of each expert in a slice; their rows in block order start at `start`."""

    experts: slice
    rows: Tensor  # [experts, n], int64, grouped rows
    tokens: Tensor  # [experts · n], int64
    saved: slice  # where pre_activation keeps them: in block order

    def of(self, parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else parameter[self.experts]


def _blocks(permutation: Tensor, num_experts: int, rows_per_expert: int) -> Iterator[_Block]:
    """Covers every grouped row once. Group sizes differ by one at most: those last rows come alone."""
    offsets = expert_offsets(len(permutation), num_experts)
    common = len(permutation) // num_experts
    first_row = torch.tensor(offsets[:-1], device=permutation.device)
    pieces = [
        (slice(0, num_experts), start, min(rows_per_expert, common - start))
        for start in range(0, common, rows_per_expert)
    ]
    pieces += [(slice(e, e + 1), common, 1) for e in range(num_experts) if offsets[e + 1] - offsets[e] > common]
    done = 0
    for experts, start, n in pieces:
        rows = first_row[experts, None] + torch.arange(start, start + n, device=permutation.device)
        saved = slice(done, done := done + rows.numel())
        yield _Block(experts, rows, permutation[rows.flatten()].long(), saved)


def _rows_per_expert(x: Tensor, num_experts: int) -> int:
    if x.dtype in (torch.float32, torch.float64):
        return max(BLOCK_ROWS // num_experts, 1)
    return max(len(x), 1)  # one block: 16-bit weight gradients summed up over blocks would be rounded each time


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """`[e, n, in]` @ `[e, out, in]`ᵀ + `[e, out]`."""
    if bias is None:
        return torch.bmm(x, weight.mT, out=out)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT, out=out)


def _add_sum(grad: Tensor, total: Tensor, beta: int) -> None:
    """total ← beta·total + Σ over rows, `[e, n, c]` → `[e, c]`."""
    if beta == 0:
        torch.sum(grad, 1, out=total)
    else:
        total += grad.sum(1)


def moe_ffn_forward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y [T, D], pre_activation [T, F or 2F] (or [0] if not saved) and the int32 permutation [T]."""
    num_experts, d_model, d_ff = down_weight.shape
    num_up = up_weight.shape[1]
    act = _ACTIVATIONS[activation]
    seed = seed.to(x.device)
    permutation = random_permutation(len(x), seed)
    y = x.new_empty(len(x), d_model)
    pre_activation = x.new_empty((len(x), num_up) if save_pre_activation else 0)
    buffer = _Buffers(x)
    for block in _blocks(permutation, num_experts, _rows_per_expert(x, num_experts)):
        shape = block.rows.shape
        block_x = buffer("x", *shape, d_model)
        torch.index_select(x, 0, block.tokens, out=block_x.flatten(0, 1))
        if save_pre_activation:
            pre = pre_activation[block.saved].view(*shape, num_up)
        else:
            pre = buffer("pre", *shape, num_up)
        _linear(block_x, up_weight[block.experts], block.of(up_bias), out=pre)
        hidden = act.forward(pre[..., :d_ff], buffer("hidden", *shape, d_ff))
        if gated:
            hidden.mul_(pre[..., d_ff:])
        if dropout_p > 0:
            hidden.mul_(dropout_scale(block.rows, d_ff, seed, dropout_p, x.dtype))
        block_y = buffer("y", *shape, d_model)
        _linear(hidden, down_weight[block.experts], block.of(down_bias), out=block_y)
        y[block.tokens] = block_y.flatten(0, 1)
    return y, pre_activation, permutation


def moe_ffn_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, up_weight, up_bias, down_weight and down_bias; [0] where `output_mask` is False."""
    need_x, need_up_weight, need_up_bias, need_down_weight, need_down_bias = output_mask
    need_pre = need_x or need_up_weight or need_up_bias
    num_experts, d_model, d_ff = down_weight.shape
    num_up = up_weight.shape[1]
    act = _ACTIVATIONS[activation]
    seed = seed.to(x.device)

    grad_x = x.new_empty(x.shape if need_x else 0)
    # The first block writes the parameters' gradients, unless some expert has no token.
    new = x.new_empty if len(x) >= num_experts else x.new_zeros
    grad_up_weight = new(up_weight.shape if need_up_weight else 0)
    grad_up_bias = new((num_experts, num_up) if need_up_bias else 0)
    grad_down_weight = new(down_weight.shape if need_down_weight else 0)
    grad_down_bias = new((num_experts, d_model) if need_down_bias else 0)
    beta = 0 if len(x) >= num_experts else 1

    buffer = _Buffers(x)
    for block in _blocks(permutation, num_experts, _rows_per_expert(x, num_experts)):
        shape, experts = block.rows.shape, block.experts
        grad_out = buffer("y", *shape, d_model)
        torch.index_select(grad_y, 0, block.tokens, out=grad_out.flatten(0, 1))
        if need_down_bias:
            _add_sum(grad_out, grad_down_bias[experts], beta)
        if not (need_down_weight or need_pre):
            beta = 1
            continue

        block_x = buffer("x", *shape, d_model)
        torch.index_select(x, 0, block.tokens, out=block_x.flatten(0, 1))
        if len(pre_activation) > 0:
            pre = pre_activation[block.saved].view(*shape, num_up)
        else:
            pre = buffer("pre", *shape, num_up)
            _linear(block_x, up_weight[experts], block.of(up_bias), out=pre)
        gate, value = pre[..., :d_ff], pre[..., d_ff:]
        activated = buffer("hidden", *shape, d_ff)
        if need_down_weight or gated:
            act.forward(gate, activated)
        scale = None
        if dropout_p > 0:
            scale = dropout_scale(block.rows, d_ff, seed, dropout_p, x.dtype)

        grad_pre = buffer("grad_pre", *shape, num_up)
        if need_pre:
            grad_hidden = buffer("grad_hidden", *shape, d_ff)
            torch.bmm(grad_out, down_weight[experts], out=grad_hidden)
            if scale is not None:
                grad_hidden.mul_(scale)
            if gated:
                torch.mul(grad_hidden, activated, out=grad_pre[..., d_ff:])
                grad_hidden.mul_(value)
            act.backward(grad_hidden, gate, grad_pre[..., :d_ff])
        if need_down_weight:
            hidden = activated.mul_(value) if gated else activated
            if scale is not None:
                hidden.mul_(scale)
            grad_down_weight[experts].baddbmm_(grad_out.mT, hidden, beta=beta)
        if need_up_bias:
            _add_sum(grad_pre, grad_up_bias[experts], beta)
        if need_up_weight:
            grad_up_weight[experts].baddbmm_(grad_pre.mT, block_x, beta=beta)
        if need_x:
            block_grad_x = torch.bmm(grad_pre, up_weight[experts], out=grad_out)
            grad_x[block.tokens] = block_grad_x.flatten(0, 1)
        beta = 1
    return grad_x, grad_up_weight, grad_up_bias, grad_down_weight, grad_down_bias
