"""The layer's forward and backward, block by block of grouped rows: matrix products by PyTorch, the rest by `Rows`.

All experts advance in lockstep, so that each product is one batched call. A block goes through gather, both
projections and scatter before the next one starts: but for products in 16 bits, which are made in one block,
`hidden` as a whole is never stored, and for backward
only `pre_activation` is kept, or nothing at all, in which case it is computed again.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ewa_kernels.kernels.choices import sum_of_choices
from ewa_kernels.kernels.copies import in_dtype
from ewa_kernels.kernels.cpp_rows import CppRows
from ewa_kernels.kernels.permutation import random_permutation
from ewa_kernels.kernels.torch_rows import Dropout, TorchRows
from ewa_kernels.reference import expert_offsets as equal_offsets

# Rows of all experts together in a block: enough for the products to run at full speed, few enough for the
# scratch memory to stay small.
BLOCK_ROWS = 2048
# Groups of other sizes advance in lockstep, which makes fewer and larger products, if all have so many rows.
LOCKSTEP_ROWS = 256


def _rows(backend: str, activation: str, gated: bool, dtype: torch.dtype) -> TorchRows:
    return {"torch": TorchRows, "cpp": CppRows}[backend](activation, gated, dtype)


class Scratch:
    """Memory that all blocks share: fresh memory can cost more than the arithmetic done in it.

    On a CPU the next call takes over what the last one left, which is no more than `LEFT_BYTES` in a process.
    """

    LEFT_BYTES = 2**26
    _left: ClassVar[list[dict[str, Tensor]]] = []  # one at the most: calls at the same time have memory of their own

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self._device, self._dtype = device, dtype
        self._memory: dict[str, Tensor] = {}
        if device.type == "cpu":
            with contextlib.suppress(IndexError):
                self._memory = self._left.pop()

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape) * self._dtype.itemsize
        if name not in self._memory or len(self._memory[name]) < size:
            with torch.inference_mode(False):  # whose tensors could be used nowhere else
                self._memory[name] = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._memory[name][:size].view(self._dtype).view(shape)

    @classmethod
    def clear(cls) -> None:
        """Frees what was left."""
        cls._left.clear()

    def leave(self) -> None:
        """Says that all is done with."""
        if self._device.type == "cpu" and sum(map(len, self._memory.values())) <= self.LEFT_BYTES:
            self._left[:] = [self._memory]


class _Block(NamedTuple):
    """`n` rows of each expert in a slice."""

    experts: slice
    rows: Tensor  # [experts, n], int64, grouped rows
    tokens: Tensor  # [experts · n], int64
    choices: Tensor  # [experts · n], int64: the tokens if k = 1
    saved: slice  # where pre_activation keeps them: in block order
    beta: int  # 0: the first block of its experts, which writes their gradients; 1: adds to them

    def of(self, parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else parameter[self.experts]


def _blocks(
    permutation: Tensor, expert_offsets: Tensor | None, top_k: int, num_experts: int, dtype: torch.dtype
) -> Iterator[_Block]:
    """Covers every grouped row once, with no more than some `BLOCK_ROWS` rows at a time of blocks of `dtype`.

    All experts advance in lockstep as far as each of them has rows, and take turns with what is left. Given offsets are
    read on the host.
    """
    num_rows, device = len(permutation), permutation.device
    # 16-bit weight gradients summed up over blocks would be rounded each time: one block, as far as possible.
    narrow = dtype not in (torch.float32, torch.float64)
    block_rows = max(num_rows * num_experts, 1) if narrow else BLOCK_ROWS
    if expert_offsets is None:
        offsets = equal_offsets(num_rows, num_experts)
        # The offsets again, computed where they are needed: a copy from the host may not be captured in a CUDA graph.
        first_row = torch.arange(num_experts, device=device) * num_rows // num_experts
    else:
        offsets = expert_offsets.tolist()
        first_row = expert_offsets[:-1].long()
    counts = [end - start for start, end in itertools.pairwise(offsets)]
    common = min(counts)
    if expert_offsets is not None and (narrow or common < max(LOCKSTEP_ROWS, max(counts) // 2)):
        common = 0  # too few rows to read all weights twice for them
    step = max(block_rows // num_experts, 1)
    pieces = [(slice(0, num_experts), start, n) for start, n in _even_pieces(common, step)]
    for e, count in enumerate(counts):
        pieces += [(slice(e, e + 1), common + start, n) for start, n in _even_pieces(count - common, block_rows)]
    done = 0
    seen: set[int] = set()
    for experts, start, n in pieces:
        beta = int(experts.start in seen)
        seen.update(range(experts.start, experts.stop))
        rows = first_row[experts, None] + torch.arange(start, start + n, device=device)
        saved = slice(done, done := done + rows.numel())
        choices = permutation[rows.flatten()].long()
        yield _Block(experts, rows, choices // top_k if top_k > 1 else choices, choices, saved, beta)


def _even_pieces(total: int, about: int) -> list[tuple[int, int]]:
    """(start, length) of pieces that are all alike long. No small one is left over: each reads all weights again."""
    count = max(round(total / about), min(total, 1))
    starts = [total * i // count for i in range(count)] + [total]
    return [(start, end - start) for start, end in itertools.pairwise(starts)]


def moe_ffn_forward(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    routing_weights: Tensor | None,
    seed: Tensor,
    permutation: Tensor | None,
    expert_offsets: Tensor | None,
    activation: str,
    gated: bool,
    dropout_p: float,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y [T, D], pre_activation [T·k, F or 2F], in block order, and the permutation drawn, int32 [T].

    The last two are [0] unless `save`, and the permutation also if it was given.
    """
    num_experts, d_model, d_ff = down_weight.shape
    num_up = up_weight.shape[1]
    rows = _rows(backend, activation, gated, x.dtype)
    seed = seed.to(x.device)
    x = x.contiguous()
    up_weight, up_bias, down_weight, down_bias = _in_dtype(rows.dtype, up_weight, up_bias, down_weight, down_bias)
    order = random_permutation(len(x), seed) if permutation is None else permutation
    weights, top_k = _weights(routing_weights, rows.dtype)
    y = x.new_empty(len(order), d_model)
    pre_activation = x.new_empty((len(order), num_up) if save else 0)
    scratch = Scratch(x.device, rows.dtype)
    for block in _blocks(order, expert_offsets, top_k, num_experts, rows.dtype):
        shape, experts = block.rows.shape, block.experts
        block_x = scratch("x", *shape, d_model)
        rows.gather(x, block.tokens, block_x)
        pre = pre_activation[block.saved].view(*shape, num_up) if save else None
        product = scratch("pre", *shape, num_up) if pre is None or pre.dtype != rows.dtype else pre
        dropout = Dropout(block.rows, seed, dropout_p) if dropout_p > 0 else None
        hidden = scratch("hidden", *shape, d_ff)
        rows.up_and_activate(block_x, up_weight[experts], block.of(up_bias), dropout, product, pre, hidden)
        block_y = scratch("y", *shape, d_model)
        factor = None if weights is None else weights[block.choices]
        rows.down_and_scatter(hidden, down_weight[experts], block.of(down_bias), factor, block.choices, block_y, y)
    scratch.leave()
    return sum_of_choices(y, top_k), pre_activation, order if save and permutation is None else order.new_empty(0)


def moe_ffn_backward(
    grad_y: Tensor,
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    routing_weights: Tensor | None,
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
    """Gradients of x, the parameters and the routing weights; [0] where `output_mask` is False.

    Without `pre_activation`, it and the permutation are computed again.
    """
    need_x, need_up_weight, need_up_bias, need_down_weight, need_down_bias, need_routing = output_mask
    need_pre = need_x or need_up_weight or need_up_bias or need_routing
    num_experts, d_model, d_ff = down_weight.shape
    num_up = up_weight.shape[1]
    rows = _rows(backend, activation, gated, x.dtype)
    seed = seed.to(x.device)
    x, grad_y = x.contiguous(), grad_y.contiguous()
    inputs = (x, up_weight, up_bias, down_weight, down_bias, routing_weights)
    dtypes = [x.dtype if t is None else t.dtype for t in inputs]
    up_weight, up_bias, down_weight, down_bias = _in_dtype(rows.dtype, up_weight, up_bias, down_weight, down_bias)
    if len(permutation) == 0:
        permutation = random_permutation(len(x), seed)

    weights, top_k = _weights(routing_weights, rows.dtype)
    offsets = expert_offsets
    every_expert_has_rows = len(x) >= num_experts if offsets is None else bool((offsets[1:] > offsets[:-1]).all())
    new = functools.partial(x.new_empty if every_expert_has_rows else x.new_zeros, dtype=rows.dtype)
    grad_x = x.new_empty((len(permutation), d_model) if need_x else 0)
    grad_routing = x.new_empty(len(permutation) if need_routing else 0, dtype=rows.dtype)
    grad_up_weight = new(up_weight.shape if need_up_weight else 0)
    grad_up_bias = new((num_experts, num_up) if need_up_bias else 0)
    grad_down_weight = new(down_weight.shape if need_down_weight else 0)
    grad_down_bias = new((num_experts, d_model) if need_down_bias else 0)

    scratch = Scratch(x.device, rows.dtype)
    for block in _blocks(permutation, expert_offsets, top_k, num_experts, rows.dtype):
        shape, experts = block.rows.shape, block.experts
        grad_out = scratch("y", *shape, d_model)
        rows.gather(grad_y, block.tokens, grad_out)
        factor = None if weights is None else weights[block.choices]
        if need_down_weight or need_pre:
            block_x = scratch("x", *shape, d_model)
            rows.gather(x, block.tokens, block_x)
            if len(pre_activation) > 0:
                pre = pre_activation[block.saved].view(*shape, num_up)
            else:
                pre = scratch("pre", *shape, num_up)
                rows.linear(block_x, up_weight[experts], block.of(up_bias), pre)
            dropout = Dropout(block.rows, seed, dropout_p) if dropout_p > 0 else None
            hidden = scratch("hidden", *shape, d_ff)
            if need_pre:
                grad_hidden = scratch("grad_hidden", *shape, d_ff)
                grad_pre = grad_hidden if factor is None and not gated else scratch("grad_pre", *shape, num_up)
                grad_factor = grad_routing.new_empty(len(block.choices)) if need_routing else None
                grad_bias = grad_up_bias[experts] if need_up_bias else None
                torch.bmm(grad_out, down_weight[experts], out=grad_hidden)
                rows.activate_backward(
                    pre, grad_hidden, dropout, factor, grad_pre, hidden, grad_factor, grad_bias, block.beta
                )
                if grad_factor is not None:
                    if down_bias is not None:
                        grad_factor += (grad_out @ down_bias[experts, :, None]).flatten()
                    grad_routing[block.choices] = grad_factor
            else:
                rows.activate(pre, dropout, hidden)
        if factor is not None:
            grad_out.mul_(factor.view(*shape, 1))
        if need_down_bias:
            rows.add_sum(grad_out, grad_down_bias[experts], block.beta)
        if need_down_weight:
            grad_down_weight[experts].baddbmm_(grad_out.mT, hidden, beta=block.beta)
        if need_up_weight:
            grad_up_weight[experts].baddbmm_(grad_pre.mT, block_x, beta=block.beta)
        if need_x:
            torch.bmm(grad_pre, up_weight[experts], out=grad_out)
            rows.scatter(grad_out, block.choices, grad_x)
    scratch.leave()
    if need_x:
        grad_x = sum_of_choices(grad_x, top_k)
    if routing_weights is not None and need_routing:
        grad_routing = grad_routing.view(routing_weights.shape)
    grads = (grad_x, grad_up_weight, grad_up_bias, grad_down_weight, grad_down_bias, grad_routing)
    return tuple(grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))


def _weights(routing_weights: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, int]:
    """The routing weights by choice, and k."""
    if routing_weights is None:
        return None, 1
    return routing_weights.to(dtype).flatten(), routing_weights.shape[1]


def _in_dtype(dtype: torch.dtype, *parameters: Tensor | None) -> Any:
    """Under autocast x is in its dtype and the parameters are not."""
    return tuple(None if parameter is None else in_dtype(parameter, dtype) for parameter in parameters)
