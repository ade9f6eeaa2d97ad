"""What a token's k choices of experts add up to: y, and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem


def sum_of_choices(rows: Tensor, top_k: int) -> Tensor:
    """Σ_j rows[t·k + j], in an order that depends on the shape alone: `[T·k, D]` → `[T, D]`."""
    if top_k == 1:
        return rows
    rows = rows.view(-1, top_k, rows.shape[1])
    # Of two the same sum, in a third of the time on a CPU.
    return rows[:, 0] + rows[:, 1] if top_k == 2 else rows.sum(1)


def grad_of_routing_weights(
    by_row: Tensor,
    problem: Problem,
    grad_y: Tensor,
    down_bias: Tensor | None,
    permutation: Tensor,
    expert_offsets: Tensor | None,
) -> Tensor:
    """`[T, k]` from what there is by grouped row `[R]` without the down bias, which is used up."""
    if down_bias is not None and expert_offsets is not None:
        by_row += grad_of_bias_factor(grad_y, down_bias, permutation, expert_offsets, problem.top_k)
    grad = torch.empty_like(by_row).index_copy_(0, existing(permutation), by_row)
    return grad.view(problem.num_tokens, problem.top_k)


def grad_of_bias_factor(
    grad_y: Tensor, down_bias: Tensor, permutation: Tensor, expert_offsets: Tensor, top_k: int
) -> Tensor:
    """grad_y[t] · down_bias[e], what the down bias adds to the gradient of a routing weight; by grouped row `[T·k]`."""
    row = torch.arange(len(permutation), dtype=expert_offsets.dtype, device=permutation.device)
    expert = torch.bucketize(row, expert_offsets[1:], right=True).clamp_(max=len(down_bias) - 1)
    products = grad_y @ down_bias.to(grad_y.dtype).T
    return products[existing(permutation) // top_k, expert]


def existing(permutation: Tensor) -> Tensor:
    """int64, within 0…R−1: nobody has looked at what was given on a GPU, where PyTorch ends the process for others."""
    return permutation.long().clamp(0, len(permutation) - 1)
