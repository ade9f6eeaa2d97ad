"""How grouped rows are cut into blocks, which go through both projections one after the other."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ewa_kernels.reference import expert_offsets as equal_offsets

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

    @property
    def numbers(self) -> range:
        """Of the experts."""
        return range(self.experts.start, self.experts.stop)

    def of(self, parameter: Tensor) -> Tensor:
        return parameter[self.experts]


class _Piece(NamedTuple):
    """Rows first … first + size − 1 of each of some experts' own rows."""

    experts: slice
    first: int
    size: int


def blocks(
    permutation: Tensor,
    expert_offsets: Tensor | None,
    top_k: int,
    num_experts: int,
    block_rows: int | None,
) -> list[Block]:
    """Each grouped row once. Experts of a block have equally many rows: all advance together as far as each of them has
    rows, and take turns with what is left. Given offsets are read on the host.

    Args:
        block_rows: of all experts together, about; None: as few blocks as possible.
    """
    num_rows, device = permutation.shape[0], permutation.device
    offsets = equal_offsets(num_rows, num_experts) if expert_offsets is None else expert_offsets.tolist()
    counts = [end - start for start, end in itertools.pairwise(offsets)]
    pieces = _by_turns(counts, block_rows, lockstep=expert_offsets is None)
    result: list[Block] = []
    done, seen = 0, set[int]()
    for piece in pieces:
        block_counts = [piece.size] * (piece.experts.stop - piece.experts.start)
        if sum(block_counts) == num_rows:
            rows, choices = torch.arange(num_rows, device=device), permutation.long()
        else:
            rows = _rows(piece, num_rows, num_experts, expert_offsets, device)
            choices = permutation[rows].long()
        tokens = choices // top_k if top_k > 1 else choices
        saved = slice(done, done := done + rows.shape[0])
        beta = int(piece.experts.start in seen)
        result.append(Block(piece.experts, block_counts, rows, tokens, choices, saved, beta))
        seen.update(result[-1].numbers)
    return result


def _rows(
    piece: _Piece, num_rows: int, num_experts: int, expert_offsets: Tensor | None, device: torch.device
) -> Tensor:
    experts, first, size = piece
    if expert_offsets is None:
        # The offsets again, where they are needed: a copy from the host may not be captured in a CUDA graph.
        first_row = torch.arange(num_experts, device=device) * num_rows // num_experts
    else:
        first_row = expert_offsets[:-1].long()
    own_rows = torch.arange(first, first + size, device=device)
    return (first_row[experts, None] + own_rows).flatten()


def _by_turns(counts: list[int], block_rows: int | None, lockstep: bool) -> list[_Piece]:
    num_experts, common = len(counts), min(counts)
    if not lockstep and (block_rows is None or common < max(LOCKSTEP_ROWS, max(counts) // 2)):
        common = 0  # too few rows to read all weights twice for them
    size = common * num_experts if block_rows is None else block_rows
    pieces = [_Piece(slice(0, num_experts), first, n) for first, n in _about(common, size // num_experts)]
    for e, count in enumerate(counts):
        alone = _about(count - common, count if block_rows is None else block_rows)
        pieces += [_Piece(slice(e, e + 1), common + first, n) for first, n in alone]
    return pieces


def _about(total: int, size: int) -> list[tuple[int, int]]:
    """(start, length) of pieces of about a size. No small one is left over: each reads all weights again."""
    return _even(total, max(round(total / max(size, 1)), min(total, 1)))


def _even(total: int, count: int) -> list[tuple[int, int]]:
    starts = [total * i // count for i in range(count)] + [total]
    return [(start, end - start) for start, end in itertools.pairwise(starts)]
