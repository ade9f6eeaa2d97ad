"""The deal by whatever is fastest where the seed is: C++, Triton or PyTorch; all give the same."""

from __future__ import annotations

from torch import Tensor

from ewa_kernels import reference
from ewa_kernels.kernels import cpp_rows, extension, fused


def random_permutation(num_tokens: int, seed: Tensor) -> Tensor:
    """`ewa_kernels.reference.random_permutation`, on the seed's device; int32 `[T]`."""
    if seed.device.type == "cpu" and extension.WHY_NOT is None:
        return cpp_rows.random_permutation(num_tokens, seed)
    if seed.device.type == "cuda" and fused.WHY_NOT is None:
        return fused.partition.random_permutation(num_tokens, seed)
    return reference.random_permutation(num_tokens, seed)
