"""Memory for large results: see `csrc/pages.h`."""

from __future__ import annotations

import torch
from torch import Tensor

from ewa_kernels.kernels import extension

if extension.WHY_NOT is None:
    from ewa_kernels import _C

# Where allocators stop to give what they have and ask the operating system, and a few huge pages of it.
LARGE_BYTES = 2**22


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """`like.new_empty(shape)`, on a CPU in huge pages if it is large.

    Each page of fresh memory is cleared when it is first written. Of 4 KiB each, that takes longer than writing what
    is computed; gradients of weights, which are fresh in each step, take a tenth of the step for it.
    """
    tensor = like.new_empty(shape, dtype=dtype)
    if tensor.device.type == "cpu" and tensor.nbytes >= LARGE_BYTES and extension.WHY_NOT is None:
        _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor
