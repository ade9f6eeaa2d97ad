"""The mean of experts as a Triton kernel: all stacked tensors of a layer in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .averaging import load_expert, round_to_bfloat16
from .configs import ASSERTS, aligned, ceil_div

BLOCK, NUM_WARPS = 1024, 4
MAX_TENSORS = 4  # up and down, weights and biases


@triton.jit
def _chosen(number, first, second, third, fourth):
    return tl.where(number < 2, tl.where(number < 1, first, second), tl.where(number < 3, third, fourth))


@triton.jit
def _load(experts, e, numel, column, mask, BF16: tl.constexpr):
    return load_expert(experts, e, numel, column, mask, BF16).to(tl.float64)


@triton.jit(do_not_specialize=["end_0", "end_1", "end_2", "num_experts"])
def merge_kernel(
    experts_0, experts_1, experts_2, experts_3,  # each [E, numel], contiguous; bfloat16 as int16
    mean_0, mean_1, mean_2, mean_3,  # each [numel]
    numel_0, numel_1, numel_2, numel_3, end_0, end_1, end_2, num_experts,
    BF16: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Means of BLOCK columns of a tensor, summed up in float64; tensor i has the programs up to `end_i`.

    Grid: blocks of columns of all tensors.
    """
    block = tl.program_id(0)
    number = (block >= end_0).to(tl.int32) + (block >= end_1).to(tl.int32) + (block >= end_2).to(tl.int32)
    block -= _chosen(number, 0, end_0, end_1, end_2)
    experts = _chosen(number, experts_0, experts_1, experts_2, experts_3)
    mean = _chosen(number, mean_0, mean_1, mean_2, mean_3)
    numel = _chosen(number, numel_0, numel_1, numel_2, numel_3)
    column = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < numel
    total = _load(experts, 0, numel, column, mask, BF16)
    for e in range(1, num_experts):
        total += _load(experts, e, numel, column, mask, BF16)
    total = total / num_experts
    if BF16:
        # As PyTorch rounds float64: to float32 first.
        rounded = round_to_bfloat16(total.to(tl.float32))
        tl.store(mean + column, rounded.to(tl.int16, bitcast=True), mask=mask)
    else:
        if mean.dtype.element_ty == tl.float16:
            total = total.to(tl.float32)
        tl.store(mean + column, total.to(mean.dtype.element_ty), mask=mask)


def merge_experts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`ewa_kernels.reference.merge_experts` of up to four tensors, of one dtype and E, on one device; contiguous."""
    assert 0 < len(tensors) <= MAX_TENSORS
    experts = [aligned(t.contiguous()) for t in tensors]
    means = [t.new_empty(t.shape[1:]) for t in experts]
    bits = (lambda t: t.view(torch.int16)) if experts[0].dtype == torch.bfloat16 else lambda t: t
    ends = [0]
    for mean in means:
        ends.append(ends[-1] + ceil_div(mean.numel(), BLOCK))
    # Those that are not there have no program.
    missing = MAX_TENSORS - len(experts)
    all_experts, all_means = experts + experts[:1] * missing, means + means[:1] * missing
    ends += ends[-1:] * missing
    if ends[-1] > 0:
        with torch.cuda.device_of(experts[0]):
            merge_kernel[(ends[-1],)](
                *map(bits, all_experts),
                *map(bits, all_means),
                *(mean.numel() for mean in all_means),
                *ends[1:MAX_TENSORS],
                len(experts[0]),
                BF16=experts[0].dtype == torch.bfloat16,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
                **ASSERTS,
            )
    return means
