"""Which module has the layer's kernels. Each has three functions:

`prepared(problem, inputs)`: inputs as the other two take them; parameters are cast, once for both.
`forward(problem, inputs, deal)`: y `[T, D]`, pre_activation `[num_kept, F or 2F]`, in an order that the backend knows,
or None unless it is saved, and the permutation `[R]`.
`backward(problem, grad_y, inputs, deal, pre_activation, needed)`: gradients of the inputs, None where not needed.
Without pre_activation, it and a permutation that is not given are computed again.
"""

from __future__ import annotations

from typing import Any

from ..problem import Problem
from . import triton as triton_kernels
from .blocked import moe_ffn as blocked_ffn


def of(problem: Problem) -> Any:
    """The module for the problem's backend."""
    if problem.backend == "cublas":
        return triton_kernels.cublas
    if problem.backend == "hopper":
        from . import hopper  # which needs Triton

        return hopper
    return triton_kernels.moe_ffn if problem.backend.startswith("triton") else blocked_ffn
