"""The deal by whatever is fastest where the seed is: C++, Triton or PyTorch; all give the same."""

from __future__ import annotations

from torch import Tensor

import ewa_kernels.reference as reference
from ewa_kernels.kernels import extension
from ewa_kernels.kernels import triton as triton_kernels
from ewa_kernels.kernels.blocked import cpp_rows


def random_permutation(num_tokens: int, seed: Tensor) -> Tensor:
    """`ewa_kernels.reference.random_permutation`, on the seed's device; int32 `[T]`."""
    if seed.device.type == "cpu" and extension.WHY_NOT is None:
        return cpp_rows.random_permutation(num_tokens, seed)
    if seed.device.type == "cuda" and triton_kernels.WHY_NOT is None:
        return triton_kernels.permutation.random_permutation(num_tokens, seed)
    return reference.random_permutation(num_tokens, seed)
