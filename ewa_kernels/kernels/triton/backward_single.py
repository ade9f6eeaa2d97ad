"""The backward in one launch: the tiles of `backward_rows` and `backward_weights` behind one queue.

Its arguments are theirs; see `pre_kernel`, `weights_kernel` and `grad_x_kernel`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward_rows import group_tile, store_pre
from .backward_weights import bias_tile, weight_tile
from .epilogues import store_rows
from .permutation import load_seed
from .queue import FIRST_COUNTER, draw_ticket, leave_clean, signal, wait_for_expert
from .tiles import (
    NUMBERS,
    block_of_tile,
    clamp_columns,
    load_choices,
    multiply_rows,
    rows_of_block,
    widths,
)


@triton.jit(do_not_specialize=NUMBERS)
def backward_kernel(
    grad_y, x, up_weight, down_weight, pre_activation, permutation, groups, routing_weights,
    grad_pre, hidden, grouped_grad_y, grouped_x, partial_routing, partial_up, partial_down, partial_weight,
    grad_x, grad_up_weight, grad_up_bias, grad_down_weight, grad_down_bias,
    counters, tables, seed, seed_low, seed_high, threshold, scale, num_rows, num_kept, num_experts, num_blocks,
    num_splits, end_pre, end_group, end_biases, end_down, end_up, end_x, d_model, d_ff,
    TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, BITS: tl.constexpr,
    FIRST: tl.constexpr, FIXED: tl.constexpr, LARGEST: tl.constexpr, AHEAD: tl.constexpr,
    EVEN_K: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr, BACKOFF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Tickets in this order, each kind up to its `end_…`; all but the first two wait for those of their expert.

    Grid: any number of programs; as many as run at once is best.
    """
    d_model, d_ff, num_up = widths(d_model, d_ff, ALIGNED, GATED)
    key = load_seed(seed, seed_low, seed_high) if DROPOUT else 0
    tiles_before = end_group // num_blocks
    ticket = draw_ticket(counters)
    while ticket < end_x:
        if EARLY:
            next_ticket = draw_ticket(counters)
        if (ticket < end_pre) | (ticket >= end_up):
            # One loop for both products: two would be merged at their ends, and no longer overlap with the loads.
            is_pre = ticket < end_pre
            size_k = tl.where(is_pre, d_model, num_up)
            size_n = tl.where(is_pre, d_ff, d_model)
            tile = tl.where(is_pre, ticket, ticket - end_up)
            block, column_tile = block_of_tile(tile, tl.cdiv(size_n, BLOCK_N), num_blocks)
            expert, first_row, end = rows_of_block(block, groups, num_rows, num_experts, num_blocks, BLOCK_M)
            if first_row < end:
                row = first_row + tl.arange(0, BLOCK_M)
                source = tl.minimum(row, end - 1)
                choice = load_choices(permutation, source, groups, num_rows)
                if not is_pre:
                    wait_for_expert(expert, groups, num_rows, num_experts, tiles_before, counters, BACKOFF, BLOCK_M)
                n = clamp_columns(column_tile * BLOCK_N + tl.arange(0, BLOCK_N), size_n, ALIGNED)
                acc = multiply_rows(
                    tl.where(is_pre, grad_y, grad_pre), tl.where(is_pre, down_weight, up_weight),
                    tl.where(is_pre, choice // TOP_K, source), n, expert, size_k, size_k, size_n, False, EVEN_K,
                    PRECISION, BLOCK_K,
                )  # fmt: skip
                if is_pre:
                    store_pre(
                        acc, row, end, choice, block, column_tile, pre_activation, routing_weights, grad_pre, hidden,
                        partial_routing, partial_up, tables, num_kept, key, threshold, scale, num_rows, d_ff,
                        ACTIVATION, GATED, DROPOUT, BITS, FIRST, FIXED, LARGEST, AHEAD, BLOCK_M, BLOCK_N, PARTS,
                    )  # fmt: skip
                    signal(counters + FIRST_COUNTER + expert)
                else:
                    store_rows(
                        acc, None, row, end, choice, column_tile * BLOCK_N, None, grad_x, d_model, BLOCK_M, BLOCK_N,
                        PARTS,
                    )  # fmt: skip
        elif ticket < end_group:
            group_tile(
                ticket - end_pre, grad_y, x, permutation, groups, routing_weights, grouped_grad_y, grouped_x,
                partial_down, counters, num_rows, num_experts, num_blocks, d_model, TOP_K, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        elif ticket < end_biases:
            bias_tile(
                ticket - end_group, partial_up, partial_down, grad_up_bias, grad_down_bias, groups, tiles_before,
                counters, num_rows, num_experts, num_up, d_model, BACKOFF, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        else:
            weight_tile(
                ticket - end_biases, end_down - end_biases, grad_pre, hidden, grouped_grad_y, grouped_x,
                grad_up_weight, grad_down_weight, partial_weight, groups, tiles_before, counters, num_rows,
                num_experts, num_splits, d_model, num_up, d_ff, BACKOFF, ALIGNED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
                PARTS,
            )  # fmt: skip
        ticket = next_ticket if EARLY else draw_ticket(counters)
    num_tiles = (end_up - end_biases) // num_splits if partial_weight is not None else 0  # of weights
    leave_clean(counters, num_experts + FIRST_COUNTER + num_tiles)
