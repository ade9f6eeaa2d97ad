"""Operands that the tensor memory accelerator (TMA) loads, by boxes: one instruction for a tile, and no addresses.

Rows must begin at 16 bytes, and no thread may have written an operand in the same launch: TMA would not see it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import Tile
from .tiles import multiply


def box_of_rows(rows: Tensor, tile: Tile) -> Any:
    """Boxes of `block_m` rows of `[R, K]`."""
    return _descriptor(rows, [tile.block_m, tile.block_k])


def box_of_weights(weight: Tensor, tile: Tile, transposed: bool, in_pairs: bool) -> Any:
    """Boxes of an expert's weight: of `[E, N, K]` if `transposed`, else `[E, K, N]`.

    `in_pairs`: N are gates, then as many values, and a box has as many of both.
    """
    n, k = tile.block_n, tile.block_k
    if in_pairs:
        num_experts, num_up, size_k = weight.shape
        return _descriptor(weight.view(num_experts, 2, num_up // 2, size_k), [1, 2, n // 2, k])
    return _descriptor(weight, [1, n, k] if transposed else [1, k, n])


def _descriptor(tensor: Tensor, box: list[int]) -> Any:
    strides = [1]  # not the tensor's own: of a size of 1 it may be any
    for size in reversed(tensor.shape[1:]):
        strides.insert(0, strides[0] * size)
    return TensorDescriptor(tensor, list(tensor.shape), strides, box)


@triton.jit
def multiply_boxes(
    a, b, a_row, first_row, expert, first_column, end_k, size_k,
    A_BOX: tl.constexpr, TRANSPOSED: tl.constexpr, IN_PAIRS: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As `tiles.multiply_rows`, with b, and a from `first_row` on if A_BOX, as descriptors.

    IN_PAIRS: columns are gates and values in turns, of hidden's columns from `first_column` on.
    """
    k = tl.arange(0, BLOCK_K)
    if not A_BOX:
        a_ptrs = a + a_row.to(tl.int64)[:, None] * size_k + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_k in range(0, end_k, BLOCK_K):
        if A_BOX:
            a_tile = a.load([first_row, first_k])
        elif EVEN_K:
            a_tile = tl.load(a_ptrs)
        else:
            a_tile = tl.load(a_ptrs, mask=(k < size_k - first_k)[None, :], other=0.0)
        if IN_PAIRS:
            b_tile = b.load([expert, 0, first_column, first_k]).reshape(BLOCK_N, BLOCK_K).T
        elif TRANSPOSED:
            b_tile = b.load([expert, first_column, first_k]).reshape(BLOCK_N, BLOCK_K).T
        else:
            b_tile = b.load([expert, first_k, first_column]).reshape(BLOCK_K, BLOCK_N)
        acc = multiply(a_tile, b_tile, acc, PRECISION)
        if not A_BOX:
            a_ptrs += BLOCK_K
    if IN_PAIRS:
        # A gate and its value are in one thread: no data moves.
        acc = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).reshape(BLOCK_M, BLOCK_N)
    return acc
