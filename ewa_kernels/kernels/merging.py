"""The mean of experts, in C++ on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ewa_kernels.kernels.extension import WHY_NOT
from ewa_kernels.kernels.parameter_pass import DTYPES

if WHY_NOT is None:
    import ewa_kernels._C as _C

__all__ = ["WHY_NOT", "merge_experts"]


def merge_experts(experts: Tensor) -> Tensor:
    """`ewa_kernels.reference.merge_experts`, to the bit; contiguous `[...]`."""
    experts = experts.contiguous()
    mean = torch.empty(experts.shape[1:], dtype=experts.dtype, device="cpu")
    _C.merge_experts(experts.data_ptr(), experts.shape[0], mean.numel(), DTYPES[experts.dtype], mean.data_ptr())
    return mean
