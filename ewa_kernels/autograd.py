"""The layer in eager mode: its autograd function, called straight. Who watches eager code sees `ops.moe_ffn`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ewa_kernels.ops as ops
import ewa_kernels.private_torch as private_torch
import ewa_kernels.seeds as seeds
from ewa_kernels.kernels import moe_ffn as kernels
from ewa_kernels.problem import Problem


def _rows(x: Tensor, problem: Problem) -> Tensor:
    """x `[T, D]`, in the dtype that is computed in."""
    if x.dtype != problem.dtype:
        x = x.to(problem.dtype)
    return x if x.ndim == 2 else x.reshape(-1, problem.d_model)


def run(
    problem: Problem,
    seed: int | Tensor | None,
    permutation: Tensor | None,
    expert_offsets: Tensor | None,
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    routing_weights: Tensor | None,
) -> Tensor:
    """y `[..., D]`, without a gradient."""
    of_backend = kernels.of(problem)
    parameters = of_backend.parameters(problem, up_weight, up_bias, down_weight, down_bias)
    y: Tensor = of_backend.forward(
        problem, _rows(x, problem), *parameters, routing_weights, seed, permutation, expert_offsets
    )[0]
    return y if y.ndim == x.ndim else y.view(x.shape)


class MoeFFN(torch.autograd.Function):
    """`run`, with gradients of x, the parameters and the routing weights; its arguments are those of `run`."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        seed: int | Tensor | None,
        permutation: Tensor | None,
        expert_offsets: Tensor | None,
        x: Tensor,
        up_weight: Tensor,
        up_bias: Tensor | None,
        down_weight: Tensor,
        down_bias: Tensor | None,
        routing_weights: Tensor | None,
    ) -> Tensor:
        of_backend = kernels.of(problem)
        rows = _rows(x, problem)
        parameters = of_backend.parameters(problem, up_weight, up_bias, down_weight, down_bias)
        y, pre_activation, order = of_backend.forward(
            problem, rows, *parameters, routing_weights, seed, permutation, expert_offsets
        )
        # What was made of x is kept only if it cost something.
        kept = x if x.dtype == problem.dtype else rows
        order = order if problem.save or problem.is_given else None
        ctx.save_for_backward(kept, *parameters, routing_weights, order, expert_offsets, pre_activation)
        ctx.set_materialize_grads(False)
        ctx.problem, ctx.seed = problem, seed
        return y if y.ndim == x.ndim else y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 10
        problem, seed, needed = ctx.problem, ctx.seed, ctx.needs_input_grad[4:]
        x, *operands, permutation, expert_offsets, pre_activation = ctx.saved_tensors
        rows, grad_rows = (t if t.ndim == 2 else t.reshape(-1, problem.d_model) for t in (x, grad_y))
        if torch.is_grad_enabled() or private_torch.is_watched((grad_y,)):
            # The operation says that it has no second derivative, or is seen.
            no_indices, nothing = rows.new_empty(0, dtype=torch.int32), rows.new_empty(0)
            grads = ops.moe_ffn_backward(
                grad_rows,
                rows,
                *operands,
                None if seed is None else seeds.tensor(seed, rows.device),
                no_indices if permutation is None else permutation,
                expert_offsets,
                nothing if pre_activation is None else pre_activation,
                problem.activation,
                problem.gated,
                problem.dropout_p,
                list(needed),
                problem.backend,
            )
            grads = [
                grad.to(dtype) if need else None
                for grad, dtype, need in zip(grads, problem.input_dtypes, needed, strict=True)
            ]
        else:
            grads = kernels.of(problem).backward(
                problem, grad_rows, rows, *operands, seed, permutation, expert_offsets, pre_activation, needed
            )
        grad_x, *others = grads
        if grad_x is not None and grad_x.ndim != x.ndim:
            grad_x = grad_x.view(x.shape)
        return (None, None, None, None, grad_x, *others)
