"""How grouped rows are cut into blocks, which go through both projections one after the other."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

# Of pre-activation in a block: enough for the products to run at full speed and for the host's work to be little, few
# enough for the scratch memory to stay small.
BLOCK_BYTES = 2**25
# Groups of other sizes advance in lockstep, which makes fewer and larger products, if all have so many rows.
LOCKSTEP_ROWS = 256


def rows_in_a_block(num_up: int, dtype: torch.dtype) -> int:
    """Of all experts together, about."""
    return max(BLOCK_BYTES // (num_up * dtype.itemsize), 1)


class Block(NamedTuple):
    """Rows of some experts, `counts[i]` of the i-th one."""

    experts: slice
    counts: list[int]
    rows: Tensor  # [sum of counts], int64, grouped rows
    tokens: Tensor  # alike: of each row
    choices: Tensor  # alike; the tokens if k = 1
    saved: slice  # where pre_activation keeps them: in block order
    beta: int  # 0: the first block of its experts, which writes their gradients; 1: adds to them

    def of(self, parameter: Tensor) -> Tensor:
        return parameter[self.experts]


def blocks(
    permutation: Tensor, expert_offsets: Tensor | None, top_k: int, num_experts: int, block_rows: int | None
) -> list[Block]:
    """Each grouped row once. Experts of a block have equally many rows: all advance together as far as each of them has
    rows, and take turns with what is left. Given offsets are read on the host.

    Args:
        block_rows: of all experts together, about; None: as few blocks as possible.
    """
    num_rows, device = permutation.shape[0], permutation.device
    if expert_offsets is None:
        offsets = [e * num_rows // num_experts for e in range(num_experts + 1)]
    else:
        offsets = expert_offsets.tolist()
    counts = [end - start for start, end in itertools.pairwise(offsets)]
    pieces = _by_turns(counts, block_rows, lockstep=expert_offsets is None)
    result: list[Block] = []
    done = 0
    for experts, first, size in pieces:
        if len(pieces) == 1:
            rows, choices = torch.arange(num_rows, device=device), permutation.long()
        else:
            if expert_offsets is None:
                # The offsets again, where they are needed: a copy from the host may not be captured in a CUDA graph.
                first_row = torch.arange(num_experts, device=device) * num_rows // num_experts
            else:
                first_row = expert_offsets[:-1].long()
            rows = (first_row[experts, None] + torch.arange(first, first + size, device=device)).flatten()
            choices = permutation[rows].long()
        tokens = choices // top_k if top_k > 1 else choices
        saved = slice(done, done := done + rows.shape[0])
        block_counts = [size] * (experts.stop - experts.start)
        result.append(Block(experts, block_counts, rows, tokens, choices, saved, beta=int(first > 0)))
    return result


def _by_turns(counts: list[int], block_rows: int | None, lockstep: bool) -> list[tuple[slice, int, int]]:
    """(experts, first, size) of each block: rows first … first + size − 1 of each of some experts' own rows."""
    num_experts, common = len(counts), min(counts)
    if not lockstep and (block_rows is None or common < max(LOCKSTEP_ROWS, max(counts) // 2)):
        common = 0  # too few rows to read all weights twice for them
    if block_rows is None:
        block_rows = sum(counts)
    pieces = [(slice(0, num_experts), first, size) for first, size in _about(common, block_rows // num_experts)]
    for e, count in enumerate(counts):
        pieces += [(slice(e, e + 1), common + first, size) for first, size in _about(count - common, block_rows)]
    return pieces


def _about(total: int, size: int) -> list[tuple[int, int]]:
    """(start, length) of equal pieces of about a size. No small one is left over: each reads all weights again."""
    count = max(round(total / max(size, 1)), min(total, 1))
    starts = [total * i // count for i in range(count)] + [total]
    return [(start, end - start) for start, end in itertools.pairwise(starts)]
