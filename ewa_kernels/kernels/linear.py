"""A linear layer by experts: one product forward, and in backward the same product with the transposed weights, x and
the result having changed places, and the gradient of the weights.

A backend's module has `prepared`, `forward` and `backward`, as they are here, for at least one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..problem import Places, Problem
from .blocked import linear as blocked


def _of(problem: Problem) -> Any:
    if problem.backend == "triton":
        from .triton import linear  # which needs Triton

        return linear
    return blocked


def prepared(problem: Problem, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """As the other two take them: cast, once for both. Rows they take as they come."""
    return _of(problem).prepared(problem, weight, bias)


def forward(problem: Problem, places: Places, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[R, D_out]`."""
    if problem.num_rows == 0:
        return x.new_empty(0, problem.d_ff)
    return _of(problem).forward(problem, places, x, weight, bias)


def backward(
    problem: Problem, places: Places, grad_out: Tensor, x: Tensor | None, weight: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x `[R, D_in]`, weight and bias, None where not needed. x may be None without that of the weights."""
    if problem.num_rows > 0:
        return problem.gradients(_of(problem).backward(problem, places, grad_out, x, weight, needed))
    shapes = ((0, problem.d_model), weight.shape, weight.shape[:2])
    return tuple(
        torch.zeros(shape, dtype=dtype, device=weight.device) if need else None
        for shape, dtype, need in zip(shapes, problem.input_dtypes, needed, strict=True)
    )
