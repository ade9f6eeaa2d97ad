"""The deal by whatever is fastest where it is needed: C++, Triton or PyTorch; all give the same."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from . import extension
from . import triton as triton_kernels

if extension.WHY_NOT is None:
    from .. import _C


def random_permutation(num_tokens: int, seed: int | Tensor, device: torch.device) -> Tensor:
    """`ewa_kernels.reference.random_permutation`; int32 `[T]`."""
    if device.type == "cpu" and extension.WHY_NOT is None:
        permutation = torch.empty(num_tokens, dtype=torch.int32, device="cpu")
        _C.random_permutation(num_tokens, int(seed), permutation.data_ptr())
        return permutation
    if device.type == "cuda" and triton_kernels.WHY_NOT is None:
        return triton_kernels.permutation.random_permutation(num_tokens, seed, device)
    return reference.random_permutation(num_tokens, seed, device=device)
