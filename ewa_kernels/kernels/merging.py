"""The mean of experts, without a gradient: in C++ on a CPU, by Triton on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import extension
from . import triton as triton_kernels
from .devices import too_old
from .parameter_pass import DTYPES

if extension.WHY_NOT is None:
    from .. import _C


def why_not(device: torch.device) -> str | None:
    """Why there is no kernel for a device; None if there is one."""
    if device.type == "cpu":
        return extension.WHY_NOT
    if device.type != "cuda":
        return "it is for CPUs and CUDA devices"
    return triton_kernels.WHY_NOT or too_old(device)


def merge_experts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`ewa_kernels.reference.merge_experts` of each, to the bit; contiguous. On a GPU in as few launches as there are
    dtypes and numbers of experts."""
    if all(t.is_cpu for t in tensors):
        return [_on_cpu(t) for t in tensors]
    means: dict[int, Tensor] = {}
    kinds = [(t.dtype, len(t), t.device) for t in tensors]
    for kind in dict.fromkeys(kinds):
        alike = [i for i, other in enumerate(kinds) if other == kind]
        means |= zip(alike, triton_kernels.merging.merge_experts([tensors[i] for i in alike]), strict=True)
    return [means[i] for i in range(len(tensors))]


def _on_cpu(experts: Tensor) -> Tensor:
    experts = experts.contiguous()
    mean = torch.empty(experts.shape[1:], dtype=experts.dtype, device="cpu")
    _C.merge_experts(experts.data_ptr(), experts.shape[0], mean.numel(), DTYPES[experts.dtype], mean.data_ptr())
    return mean
