"""The backward by experts: gradients of both weights, and of both biases from sums over row blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogues import store_rows
from .queue import FIRST_COUNTER, leave_clean, signal, wait_for_expert
from .tiles import (
    NUMBERS,
    clamp_columns,
    first_block_of_expert,
    multiply,
    rows_of_expert,
    widths,
)

_SUM_BLOCKS = tl.constexpr(32)  # row blocks at a time in sums over them


@triton.jit
def bias_tile(
    tile, partial_up, partial_down, grad_up_bias, grad_down_bias, groups, tiles_before, counters, num_rows, num_experts,
    num_up, d_model, BACKOFF: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Columns of grad_up_bias, then of grad_down_bias: the sums of all row blocks, of `ROWS` rows, of an expert.

    `tiles_before`: of each row block, see `wait_for_expert`; None: all are done.
    """
    column_tile = tile // num_experts
    expert = tile - column_tile * num_experts
    if tiles_before is not None:
        wait_for_expert(expert, groups, num_rows, num_experts, tiles_before, counters, BACKOFF, ROWS)
    start, end = rows_of_expert(expert, groups, num_rows, num_experts)
    first_block = first_block_of_expert(expert, groups, num_rows, num_experts, ROWS)
    blocks = tl.cdiv(end - start, ROWS)
    up_tiles = 0
    if partial_up is not None:
        up_tiles = tl.cdiv(num_up, BLOCK_N)
        if column_tile < up_tiles:
            column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
            _sum_blocks(partial_up, first_block, blocks, column, num_up, grad_up_bias + expert.to(tl.int64) * num_up)
    if partial_down is not None:  # noqa: SIM102 (the one is known when this is compiled, the other is not)
        if column_tile >= up_tiles:
            column = (column_tile - up_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
            out = grad_down_bias + expert.to(tl.int64) * d_model
            _sum_blocks(partial_down, first_block, blocks, column, d_model, out)


@triton.jit
def _sum_blocks(partial, first_block, num_blocks, column, num_columns, out):
    """out = the sum of an expert's row blocks, always in the same order."""
    exists = column < num_columns
    total = tl.zeros(column.shape, tl.float32)
    for first in range(0, num_blocks, _SUM_BLOCKS):
        block = first + tl.arange(0, _SUM_BLOCKS)
        index = (first_block + block).to(tl.int64)[:, None] * num_columns + column[None, :]
        total += tl.sum(tl.load(partial + index, mask=(block < num_blocks)[:, None] & exists[None, :], other=0.0), 0)
    tl.store(out + column, total, mask=exists)


@triton.jit
def weight_tile(
    ticket, end_down, grad_pre, hidden, grouped_grad_y, grouped_x, grad_up_weight, grad_down_weight, partial_weight,
    groups, tiles_before, counters, num_rows, num_experts, num_splits, d_model, num_up, d_ff,
    BACKOFF: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Of an expert: grad_down = grouped_grad_yᵀ @ hidden up to `end_down`, then grad_up = grad_preᵀ @ grouped_x.

    One ticket adds up one of `num_splits` parts of the rows; the last of a tile's adds up the parts.
    """
    # One loop for both: the ends of two would be merged, and each product would wait for the one before.
    is_down = ticket < end_down
    tile = tl.where(is_down, ticket, ticket - end_down)
    size_m = tl.where(is_down, d_model, num_up)
    size_n = tl.where(is_down, d_ff, d_model)
    split = tile % num_splits
    tile = tile // num_splits
    tiles_m = tl.cdiv(size_m, BLOCK_M)
    tiles_n = tl.cdiv(size_n, BLOCK_N)
    expert = tile // (tiles_m * tiles_n)
    rest = tile - expert * (tiles_m * tiles_n)
    tile_n = rest // tiles_m
    tile_m = rest - tile_n * tiles_m
    if tiles_before is not None:
        wait_for_expert(expert, groups, num_rows, num_experts, tiles_before, counters, BACKOFF, BLOCK_M)
    start, end = rows_of_expert(expert, groups, num_rows, num_experts)
    length = tl.cdiv(end - start, num_splits)
    start += split * length
    end = tl.minimum(start + length, end)

    a = tl.where(is_down, grouped_grad_y, grad_pre)
    b = tl.where(is_down, hidden, grouped_x)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    a_column = clamp_columns(m, size_m, ALIGNED)
    b_column = clamp_columns(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), size_n, ALIGNED)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a + (start + k).to(tl.int64)[:, None] * size_m + a_column[None, :]
    b_ptrs = b + (start + k).to(tl.int64)[:, None] * size_n + b_column[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(start, end, BLOCK_K):
        inside = (k < end - first)[:, None]
        a_tile = tl.load(a_ptrs, mask=inside, other=0.0)
        b_tile = tl.load(b_ptrs, mask=inside, other=0.0)
        acc = multiply(a_tile.T, b_tile, acc, PRECISION)
        a_ptrs += BLOCK_K * size_m
        b_ptrs += BLOCK_K * size_n

    out = tl.where(is_down, grad_down_weight, grad_up_weight)
    out += expert.to(tl.int64) * size_m * size_n
    if partial_weight is None:
        store_rows(acc, None, m, size_m, m, tile_n * BLOCK_N, None, out, size_n, BLOCK_M, BLOCK_N, PARTS)
    else:
        first_split = ticket - split
        partial = partial_weight + first_split.to(tl.int64) * (BLOCK_M * BLOCK_N)
        own, i = partial + split * (BLOCK_M * BLOCK_N), tl.arange(0, BLOCK_M)
        store_rows(acc, None, i, BLOCK_M, i, 0, None, own, BLOCK_N, BLOCK_M, BLOCK_N, PARTS)
        if signal(counters + FIRST_COUNTER + num_experts + first_split // num_splits) == num_splits - 1:
            _sum_splits(
                partial, num_splits, m, tile_n * BLOCK_N, size_m, size_n, out, BLOCK_M, BLOCK_N, BLOCK_N // PARTS
            )


@triton.jit
def _sum_splits(
    partial, num_splits, m, n, size_m, size_n, out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out = the sum of `num_splits` tiles `[BLOCK_M, BLOCK_N]`, always in the same order."""
    for first_column in range(0, BLOCK_N, WIDTH):
        index = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + (first_column + tl.arange(0, WIDTH))[None, :]
        total = tl.zeros((BLOCK_M, WIDTH), tl.float32)
        for split in range(num_splits):
            total += tl.load(partial + tl.cast(split, tl.int64) * (BLOCK_M * BLOCK_N) + index)
        column = n + first_column + tl.arange(0, WIDTH)
        inside = (m < size_m)[:, None] & (column < size_n)[None, :]
        tl.store(out + m.to(tl.int64)[:, None] * size_n + column[None, :], total, mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def weights_kernel(
    groups,  # table of given groups for blocks of ROWS rows, see groups.py, or None: equal groups
    grad_pre,  # [R, F or 2F], by grouped row
    hidden,  # [R, F], by grouped row, times the routing weight
    grouped_grad_y,  # [R, D], by grouped row
    grouped_x,  # [R, D], by grouped row
    partial_up,  # float32 [row blocks, F or 2F], or None without grad_up_bias
    partial_down,  # float32 [row blocks, D], or None without grad_down_bias
    partial_weight,  # float32 scratch, a tile for each ticket for a weight, or None if num_splits = 1
    grad_up_weight, grad_up_bias, grad_down_weight, grad_down_bias,  # those that no tile asks for are never touched
    counters, num_rows, num_experts,
    num_splits,  # parts of an expert's rows that different tickets add up for a weight
    end_biases, end_down, end_up, d_model, d_ff,
    ROWS: tl.constexpr,  # of the row blocks in partial_up and partial_down
    GATED: tl.constexpr,
    ALIGNED: tl.constexpr,  # 8 divides D and F
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Tiles up to `end_biases`: `bias_tile`; up to `end_down`, then `end_up`: `weight_tile`.

    Grid: any number of programs; as many as run at once is best.
    """
    d_model, d_ff, num_up = widths(d_model, d_ff, ALIGNED, GATED)
    for tile in range(tl.program_id(0), end_up, tl.num_programs(0)):
        if tile < end_biases:
            bias_tile(
                tile, partial_up, partial_down, grad_up_bias, grad_down_bias, groups, None, counters, num_rows,
                num_experts, num_up, d_model, False, ROWS, BLOCK_N,
            )  # fmt: skip
        else:
            weight_tile(
                tile - end_biases, end_down - end_biases, grad_pre, hidden, grouped_grad_y, grouped_x, grad_up_weight,
                grad_down_weight, partial_weight, groups, None, counters, num_rows, num_experts, num_splits, d_model,
                num_up, d_ff, False, ALIGNED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, PARTS,
            )  # fmt: skip
    if partial_weight is not None:
        leave_clean(counters, num_experts + FIRST_COUNTER + (end_up - end_biases) // num_splits)
