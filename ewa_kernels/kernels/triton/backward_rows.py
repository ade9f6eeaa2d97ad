"""The backward by row blocks: grad_pre and hidden, what the weights' gradients read, and grad_x."""

from __future__ import annotations

import triton
import triton.language as tl

from .boxes import multiply_boxes
from .epilogues import load_pre, store_grad_pre, store_rows
from .permutation import load_seed
from .queue import FIRST_COUNTER, signal
from .tiles import (
    NUMBERS,
    block_of_tile,
    clamp_columns,
    load_choices,
    multiply_rows,
    rows_of_block,
    widths,
)


@triton.jit
def store_pre(
    acc, row, end, choice, block, column_tile, pre_activation, routing_weights, grad_pre, hidden, partial_routing,
    partial_up, tables, num_kept, key, threshold, scale, num_rows, d_ff,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr,
    FIXED: tl.constexpr, LARGEST: tl.constexpr, AHEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """From a tile of grad_y @ down_weight: grad_pre and hidden, grad_pre's sum over rows, the routing weights' part."""
    factor = None
    if routing_weights is not None:
        factor = tl.load(routing_weights + choice).to(tl.float32)
    piece = None
    if partial_routing is not None:
        piece = partial_routing + column_tile.to(tl.int64) * num_rows + row
    first_column = column_tile * BLOCK_N
    stop = tl.minimum(first_column + BLOCK_N, d_ff)
    gate, value = load_pre(
        pre_activation, row, end, first_column, stop, tables, num_kept, d_ff, GATED, BITS, FIRST, FIXED, LARGEST,
        BLOCK_M, BLOCK_N // PARTS,
    )  # fmt: skip
    store_grad_pre(
        acc, gate, value, row, end, block, first_column, stop, pre_activation, grad_pre, hidden, partial_up, factor,
        piece, tables, num_kept, key, threshold, scale, d_ff, ACTIVATION, GATED, DROPOUT, BITS, FIRST, FIXED, LARGEST,
        AHEAD, True, BLOCK_M, BLOCK_N, PARTS,
    )  # fmt: skip


@triton.jit
def group_tile(
    tile, grad_y, x, permutation, groups, routing_weights, grouped_grad_y, grouped_x, partial_down, counters,
    num_rows, num_experts, num_blocks, d_model, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of a row block: grad_y and x by grouped row; partial_down = grad_y (times routing weights) summed over its rows.

    The weights' products would not have their rows in time if each step looked them up. `counters`: None where nobody
    waits for the rows.
    """
    block, column_tile = block_of_tile(tile, tl.cdiv(d_model, BLOCK_N), num_blocks)
    expert, first_row, end = rows_of_block(block, groups, num_rows, num_experts, num_blocks, BLOCK_M)
    if first_row < end:
        half: tl.constexpr = BLOCK_N // 2  # the whole takes too many registers
        for first_column in range(column_tile * BLOCK_N, (column_tile + 1) * BLOCK_N, half):
            column = first_column + tl.arange(0, half)
            exists = column < d_model
            row = first_row + tl.arange(0, BLOCK_M)
            choice = load_choices(permutation, tl.minimum(row, end - 1), groups, num_rows)
            inside = (row < end)[:, None] & exists[None, :]
            source = (choice // TOP_K).to(tl.int64)[:, None] * d_model + column[None, :]
            target = row.to(tl.int64)[:, None] * d_model + column[None, :]
            values = tl.load(grad_y + source, mask=inside, other=0.0)
            tl.store(grouped_x + target, tl.load(x + source, mask=inside), mask=inside)
            tl.store(grouped_grad_y + target, values, mask=inside)
            if partial_down is not None:
                total = values.to(tl.float32)
                if routing_weights is not None:
                    total *= tl.load(routing_weights + choice, mask=row < end, other=0.0).to(tl.float32)[:, None]
                tl.store(partial_down + block.to(tl.int64) * d_model + column, tl.sum(total, 0), mask=exists)
        if counters is not None:
            signal(counters + FIRST_COUNTER + expert)


@triton.jit(do_not_specialize=NUMBERS)
def pre_kernel(
    grad_y,  # [T, D]
    x,  # [T, D]
    down_weight,  # [E, D, F]; with BOXES its descriptor
    pre_activation,  # [R, F or 2F], by grouped row
    permutation,  # int32 [R]
    groups,  # table of given groups, see groups.py, or None: equal groups
    routing_weights,  # [R], by choice, or None
    grad_pre,  # [R, F or 2F], by grouped row
    hidden,  # [R, F], by grouped row, times the routing weight
    grouped_grad_y,  # [R, D], by grouped row
    grouped_x,  # [R, D], by grouped row
    partial_routing,  # float32 [⌈F / BLOCK_N⌉, R], by grouped row, or None
    partial_up,  # float32 [row blocks, F or 2F], or None
    partial_down,  # float32 [row blocks, D], or None
    tables,  # of codec.py, or None
    seed, seed_low, seed_high, threshold, scale, num_rows, num_kept, num_experts, num_blocks, end_pre, end_group,
    d_model, d_ff,
    TOP_K: tl.constexpr,  # R = T · TOP_K
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr,
    BITS: tl.constexpr,  # of what is kept of pre_activation; 0: it is kept as it is
    FIRST: tl.constexpr, FIXED: tl.constexpr,  # see `codec.store_encoded`
    LARGEST: tl.constexpr,  # of x's type
    AHEAD: tl.constexpr,  # whether pre_activation is loaded before it is needed
    EVEN_K: tl.constexpr,  # BLOCK_K divides D and F
    ALIGNED: tl.constexpr,  # 8 divides D and F
    PRECISION: tl.constexpr,
    BOXES: tl.constexpr,  # see `configs.Tile`
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Tiles up to `end_pre`: `store_pre` of grad_y @ down_weight; up to `end_group`: `group_tile`.

    Grid: any number of programs; as many as run at once is best.
    """
    d_model, d_ff, _ = widths(d_model, d_ff, ALIGNED, GATED)
    key = load_seed(seed, seed_low, seed_high) if DROPOUT else 0
    for tile in range(tl.program_id(0), end_group, tl.num_programs(0)):
        if tile < end_pre:
            block, column_tile = block_of_tile(tile, tl.cdiv(d_ff, BLOCK_N), num_blocks)
            expert, first_row, end = rows_of_block(block, groups, num_rows, num_experts, num_blocks, BLOCK_M)
            if first_row < end:
                row = first_row + tl.arange(0, BLOCK_M)
                choice = load_choices(permutation, tl.minimum(row, end - 1), groups, num_rows)
                n = clamp_columns(column_tile * BLOCK_N + tl.arange(0, BLOCK_N), d_ff, ALIGNED)
                if BOXES:
                    acc = multiply_boxes(
                        grad_y, down_weight, choice // TOP_K, first_row, expert, column_tile * BLOCK_N, d_model,
                        d_model, False, False, False, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
                    )  # fmt: skip
                else:
                    acc = multiply_rows(
                        grad_y, down_weight, choice // TOP_K, n, expert, d_model, d_model, d_ff, False, EVEN_K,
                        PRECISION, BLOCK_K,
                    )  # fmt: skip
                store_pre(
                    acc, row, end, choice, block, column_tile, pre_activation, routing_weights, grad_pre, hidden,
                    partial_routing, partial_up, tables, num_kept, key, threshold, scale, num_rows, d_ff, ACTIVATION,
                    GATED, DROPOUT, BITS, FIRST, FIXED, LARGEST, AHEAD, BLOCK_M, BLOCK_N, PARTS,
                )  # fmt: skip
        else:
            group_tile(
                tile - end_pre, grad_y, x, permutation, groups, routing_weights, grouped_grad_y, grouped_x,
                partial_down, None, num_rows, num_experts, num_blocks, d_model, TOP_K, BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def grad_x_kernel(
    up_weight,  # [E, F or 2F, D]; with BOXES its descriptor
    permutation,  # int32 [R]
    groups,  # table of given groups, see groups.py, or None: equal groups
    grad_pre,  # [R, F or 2F], by grouped row; with BOXES its descriptor
    grad_x,  # [R, D], by choice
    num_rows, num_experts, num_blocks, d_model, d_ff,
    GATED: tl.constexpr, EVEN_K: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    FLAT: tl.constexpr, BOXES: tl.constexpr,  # see `configs.Tile`
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """grad_x = grad_pre @ up_weight.

    Grid: any number of programs; as many as run at once is best.
    """
    d_model, d_ff, num_up = widths(d_model, d_ff, ALIGNED, GATED)
    tiles = tl.cdiv(d_model, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_blocks * tiles, tl.num_programs(0), flatten=FLAT):
        block, column_tile = block_of_tile(tile, tiles, num_blocks)
        expert, first_row, end = rows_of_block(block, groups, num_rows, num_experts, num_blocks, BLOCK_M)
        # Without rows the product has no steps. But loops are made one only if the inner has always as many.
        end_k = num_up if FLAT else tl.where(first_row < end, num_up, 0)
        row = first_row + tl.arange(0, BLOCK_M)
        source = tl.maximum(tl.minimum(row, end - 1), 0)  # past the end, work on the last row again
        choice = load_choices(permutation, source, groups, num_rows)
        if BOXES:
            acc = multiply_boxes(
                grad_pre, up_weight, source, first_row, expert, column_tile * BLOCK_N, end_k, num_up,
                True, False, False, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            n = clamp_columns(column_tile * BLOCK_N + tl.arange(0, BLOCK_N), d_model, ALIGNED)
            acc = multiply_rows(
                grad_pre, up_weight, source, n, expert, end_k, num_up, d_model, False, EVEN_K, PRECISION, BLOCK_K
            )
        store_rows(acc, None, row, end, choice, column_tile * BLOCK_N, None, grad_x, d_model, BLOCK_M, BLOCK_N, PARTS)
