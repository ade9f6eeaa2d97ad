"""Which module has the layer's kernels: each has three functions.

`parameters` gives up_weight, up_bias, down_weight and down_bias as the other two take them: cast once for both.
`forward` gives y `[T, D]`, pre_activation and the permutation `[R]`; `backward` gives gradients. What they take is said
in `blocked/moe_ffn.py`.
"""

from __future__ import annotations

from typing import Any

from ewa_kernels.kernels import triton as triton_kernels
from ewa_kernels.kernels.blocked import moe_ffn as blocked_ffn
from ewa_kernels.problem import Problem


def of(problem: Problem) -> Any:
    """The module for the problem's backend."""
    return triton_kernels.moe_ffn if problem.backend.startswith("triton") else blocked_ffn
