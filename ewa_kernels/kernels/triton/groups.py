"""The table of groups that are given: what a kernel asks of each tile, found out once for a launch.

`groups`, int32, for row blocks of BLOCK_M rows: [0…E] the experts' offsets, [E + 1…2E] the first block of each
expert, [2E + 1…] the expert of each block. It keeps every wait finite and every address within the tensors, whatever
offsets are given: they rise from 0 to R in it, and so the blocks are no more than there are numbers for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import ASSERTS, aligned, ceil_div
from .tiles import NUMBERS

BLOCKS, EXPERTS = 64, 128


@triton.jit(do_not_specialize=NUMBERS)
def groups_kernel(
    expert_offsets,  # int32 [E + 1]
    groups,  # int32 [2E + 1 + row blocks]
    num_rows, num_experts, num_blocks, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Writes the experts of BLOCKS row blocks; the first program, all experts' rows and first blocks too.

    Grid: ⌈row blocks / BLOCKS⌉.
    """
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    expert_of_block = tl.zeros((BLOCKS,), tl.int32)
    rows = tl.zeros((1,), tl.int64)  # of the experts so far
    blocks = tl.zeros((1,), tl.int32)
    for first in range(0, num_experts, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        exists = expert < num_experts
        start = tl.load(expert_offsets + expert, mask=exists, other=0)
        end = tl.load(expert_offsets + expert + 1, mask=exists, other=0)
        tl.device_assert(start <= end, "expert_offsets must rise")
        tl.device_assert((expert > 0) | (start == 0), "expert_offsets must begin with 0")
        tl.device_assert((expert != num_experts - 1) | (end == num_rows), "expert_offsets must end with R")
        count = tl.minimum(tl.maximum(end.to(tl.int64) - start, 0), num_rows)
        end = rows + tl.cumsum(count, 0)
        start = tl.minimum(end - count, num_rows).to(tl.int32)
        # Each row has an expert.
        end = tl.where(expert < num_experts - 1, tl.minimum(end, num_rows), num_rows).to(tl.int32)
        of_expert = tl.where(exists, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
        end_block = blocks + tl.cumsum(of_expert, 0)
        is_before = exists[None, :] & (end_block[None, :] <= block[:, None])
        expert_of_block += tl.sum(is_before.to(tl.int32), 1)
        if tl.program_id(0) == 0:
            tl.store(groups + expert, start, mask=exists)
            tl.store(groups + expert + 1, end, mask=expert == num_experts - 1)
            tl.store(groups + num_experts + 1 + expert, end_block - of_expert, mask=exists)
        rows += tl.sum(count)
        blocks += tl.sum(of_expert)
    # Blocks that do not exist are the last expert's, past its rows.
    tl.store(
        groups + 2 * num_experts + 1 + block, tl.minimum(expert_of_block, num_experts - 1), mask=block < num_blocks
    )


def tabulate(expert_offsets: Tensor, num_rows: int, num_blocks: int, block_m: int) -> Tensor:
    """`groups` for given offsets, int32 `[E + 1]`, and R ≥ 1 rows."""
    num_experts = len(expert_offsets) - 1
    groups = torch.empty(2 * num_experts + 1 + num_blocks, dtype=torch.int32, device=expert_offsets.device)
    arguments = (aligned(expert_offsets), groups, num_rows, num_experts, num_blocks, block_m, BLOCKS, EXPERTS)
    groups_kernel[(ceil_div(num_blocks, BLOCKS),)](*arguments, **ASSERTS)
    return groups
