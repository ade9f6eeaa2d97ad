"""The backward in one launch: gradients of x, of both weights and of both biases.

The same kernel does it in three launches (`FORM`), as a fallback and to compare with.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ewa_kernels.kernels.counters import zeroed_counters
from ewa_kernels.kernels.triton.configs import ceil_div
from ewa_kernels.kernels.triton.epilogues import (
    group_rows,
    load_pre,
    store_grad_pre,
    store_rows,
    store_split,
    sum_blocks,
    sum_splits,
)
from ewa_kernels.kernels.triton.layer import Layer
from ewa_kernels.kernels.triton.permutation import load_seed
from ewa_kernels.kernels.triton.tiles import (
    FIRST_COUNTER,
    block_of_tile,
    clamp_columns,
    draw_ticket,
    first_block_of_expert,
    leave_clean,
    load_choices,
    multiple_of_eight,
    multiply,
    rows_of_block,
    rows_of_expert,
    signal,
    wait_for_expert,
)

_MAX_SPLITS = 8
_MIN_SPLIT_STEPS = 8  # steps of a product's loop that a split has at least


@triton.jit(do_not_specialize=[
    "num_rows", "num_experts", "num_blocks", "num_splits", "num_counters", "seed_low", "seed_high", "threshold",
    "scale", "first_ticket", "end_pre", "end_sums", "end_biases", "end_down", "end_up", "end_ticket",
])  # fmt: skip
def backward_kernel(
    grad_y,  # [T, D]
    x,  # [T, D]
    up_weight,  # [E, F or 2F, D]
    down_weight,  # [E, D, F]
    pre_activation,  # [R, F or 2F], by grouped row
    permutation,  # int32 [R]
    groups,  # table of given groups, see groups.py, or None: equal groups
    routing_weights,  # [R], by choice, or None
    grad_x,  # [R, D], by choice
    grad_up_weight,
    grad_up_bias,
    grad_down_weight,
    grad_down_bias,  # gradients that no ticket asks for are never touched
    grad_pre,  # scratch [R, F or 2F], by grouped row
    hidden,  # scratch [R, F], by grouped row, times the routing weight
    grouped_grad_y,  # scratch [R, D], by grouped row
    grouped_x,  # scratch [R, D], by grouped row
    partial_routing,  # float32 [⌈F / BLOCK_N⌉, R], by grouped row, or None
    partial_up,  # float32 scratch [row blocks, F or 2F], or None without grad_up_bias
    partial_down,  # float32 scratch [row blocks, D], or None without grad_down_bias
    partial_weight,  # float32 scratch, a tile for each ticket for a weight, or None if num_splits = 1
    counters,
    seed,
    seed_low,
    seed_high,
    threshold,
    scale,
    num_rows,
    num_experts,
    num_blocks,
    num_splits,  # parts of an expert's rows that different tickets add up for a weight
    num_counters,
    first_ticket,
    end_pre,
    end_sums,
    end_biases,
    end_down,
    end_up,
    end_ticket,
    d_model,
    d_ff,
    TOP_K: tl.constexpr,  # R = T · TOP_K
    SINGLE: tl.constexpr,  # all tickets in one launch; else those from first_ticket on, without waiting
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    DROPOUT: tl.constexpr,
    AHEAD: tl.constexpr,  # whether pre_activation is loaded before it is needed
    EVEN_K: tl.constexpr,  # BLOCK_K divides D and F
    ALIGNED: tl.constexpr,  # 8 divides D and F
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Tickets, in this order, each kind up to its `end_…`:

    pre: grad_pre and hidden of a row block, by columns of hidden; sums: grad_y and x of a row block, by grouped
    row (looked up in each step of the weights' products, they would not be there in time), and grad_y's sum over it;
    biases: the sums of all row blocks of an expert; down, up: a tile of a weight's gradient;
    x: grad_x of a row block. All but the first two wait until those of their expert are done.

    Grid: any number of programs; as many as run at once is best.
    """
    if ALIGNED:
        d_model, d_ff = multiple_of_eight(d_model), multiple_of_eight(d_ff)
    num_up = d_ff * 2 if GATED else d_ff
    key = load_seed(seed, seed_low, seed_high) if DROPOUT else 0
    if SINGLE:
        ticket = draw_ticket(counters)
    else:
        ticket = first_ticket + tl.program_id(0)

    while ticket < end_ticket:
        if (ticket < end_pre) | (ticket >= end_up):
            # --- rows: grad_hidden = grad_y[token] @ down_weight, or grad_x[token] = grad_pre @ up_weight ---
            is_pre = ticket < end_pre
            tiles = tl.cdiv(tl.where(is_pre, d_ff, d_model), BLOCK_N)
            block, column_tile = block_of_tile(tl.where(is_pre, ticket, ticket - end_up), tiles, num_blocks)
            expert, first_row, end = rows_of_block(block, groups, num_rows, num_experts, num_blocks, BLOCK_M)
            if first_row < end:
                row = first_row + tl.arange(0, BLOCK_M)
                source = tl.minimum(row, end - 1)
                choice = load_choices(permutation, source, groups, num_rows)
                if SINGLE:  # noqa: SIM102 (the one is known when this is compiled, the other is not)
                    if ticket >= end_up:
                        wait_for_expert(expert, groups, num_rows, num_experts, num_blocks, end_sums, counters, BLOCK_M)
                size_k = tl.where(is_pre, d_model, num_up)
                size_n = tl.where(is_pre, d_ff, d_model)
                a = tl.where(is_pre, grad_y, grad_pre)
                b = tl.where(is_pre, down_weight, up_weight)
                a_row = tl.where(is_pre, choice // TOP_K, source)
                n = clamp_columns(column_tile * BLOCK_N + tl.arange(0, BLOCK_N), size_n, ALIGNED)
                k = tl.arange(0, BLOCK_K)
                a_ptrs = a + a_row.to(tl.int64)[:, None] * size_k + k[None, :]
                b_ptrs = b + (expert.to(tl.int64) * size_k + k)[:, None] * size_n + n[None, :]
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for first_k in range(0, size_k, BLOCK_K):
                    if EVEN_K:
                        a_tile = tl.load(a_ptrs)
                        b_tile = tl.load(b_ptrs)
                    else:
                        inside = k < size_k - first_k
                        a_tile = tl.load(a_ptrs, mask=inside[None, :], other=0.0)
                        b_tile = tl.load(b_ptrs, mask=inside[:, None], other=0.0)
                    acc = multiply(a_tile, b_tile, acc, PRECISION)
                    a_ptrs += BLOCK_K
                    b_ptrs += BLOCK_K * size_n
                if is_pre:
                    factor = None
                    if routing_weights is not None:
                        factor = tl.load(routing_weights + choice).to(tl.float32)
                    piece = None
                    if partial_routing is not None:
                        piece = partial_routing + column_tile.to(tl.int64) * num_rows + row
                    first_column = column_tile * BLOCK_N
                    stop = tl.minimum(first_column + BLOCK_N, d_ff)
                    gate, value = load_pre(
                        pre_activation, row, end, first_column, stop, d_ff, GATED, BLOCK_N // PARTS
                    )  # fmt: skip
                    store_grad_pre(
                        acc, gate, value, row, end, block, first_column, stop, pre_activation, grad_pre, hidden,
                        partial_up, factor, piece, key, threshold, scale, d_ff, ACTIVATION, GATED, DROPOUT, AHEAD,
                        True, BLOCK_M, BLOCK_N, PARTS,
                    )  # fmt: skip
                    if SINGLE:
                        signal(counters + FIRST_COUNTER + expert)
                else:
                    store_rows(
                        acc, None, row, end, choice, column_tile * BLOCK_N, None, grad_x, d_model, BLOCK_M, BLOCK_N,
                        PARTS,
                    )  # fmt: skip
        elif ticket < end_sums:
            # --- grad_y and x by grouped row, and grad_y summed over a row block ---
            block, column_tile = block_of_tile(ticket - end_pre, tl.cdiv(d_model, BLOCK_N), num_blocks)
            expert, first_row, end = rows_of_block(block, groups, num_rows, num_experts, num_blocks, BLOCK_M)
            if first_row < end:
                half: tl.constexpr = BLOCK_N // 2  # the whole takes too many registers
                for first_column in range(column_tile * BLOCK_N, (column_tile + 1) * BLOCK_N, half):
                    group_rows(
                        grad_y, x, permutation, groups, routing_weights, block, first_row, end, first_column, num_rows,
                        d_model, grouped_grad_y, grouped_x, partial_down, TOP_K, BLOCK_M, half,
                    )  # fmt: skip
                if SINGLE:
                    signal(counters + FIRST_COUNTER + expert)
        elif ticket < end_biases:
            # --- biases: columns of up, then of down ---
            tile = ticket - end_sums
            column_tile = tile // num_experts
            expert = tile - column_tile * num_experts
            if SINGLE:
                wait_for_expert(expert, groups, num_rows, num_experts, num_blocks, end_sums, counters, BLOCK_M)
            start, end = rows_of_expert(expert, groups, num_rows, num_experts)
            first_block = first_block_of_expert(expert, groups, num_rows, num_experts, BLOCK_M)
            blocks = tl.cdiv(end - start, BLOCK_M)
            up_tiles = 0
            if partial_up is not None:
                up_tiles = tl.cdiv(num_up, BLOCK_N)
                if column_tile < up_tiles:
                    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
                    out = grad_up_bias + expert.to(tl.int64) * num_up
                    sum_blocks(partial_up, first_block, blocks, column, num_up, out)
            if partial_down is not None:  # noqa: SIM102 (the one is known when this is compiled, the other is not)
                if column_tile >= up_tiles:
                    column = (column_tile - up_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
                    out = grad_down_bias + expert.to(tl.int64) * d_model
                    sum_blocks(partial_down, first_block, blocks, column, d_model, out)
        else:
            # --- weights: grad_down = grouped_grad_yᵀ @ hidden, or grad_up = grad_preᵀ @ grouped_x ---
            is_down = ticket < end_down
            tile = tl.where(is_down, ticket - end_biases, ticket - end_down)
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
            if SINGLE:
                wait_for_expert(expert, groups, num_rows, num_experts, num_blocks, end_sums, counters, BLOCK_M)
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
                first_split = ticket - end_biases - split
                partial = partial_weight + first_split.to(tl.int64) * (BLOCK_M * BLOCK_N)
                store_split(acc, partial + split * (BLOCK_M * BLOCK_N), 0, BLOCK_M, BLOCK_N, BLOCK_N, PARTS)
                counter = counters + FIRST_COUNTER + num_experts + first_split // num_splits
                if signal(counter) == num_splits - 1:
                    sum_splits(
                        partial, num_splits, m, tile_n * BLOCK_N, size_m, size_n, out, BLOCK_M, BLOCK_N,
                        BLOCK_N // PARTS,
                    )  # fmt: skip
        if SINGLE:
            ticket = draw_ticket(counters)
        else:
            ticket += tl.num_programs(0)
    leave_clean(counters, num_counters)


def launch_backward(
    layer: Layer,
    grad_y: Tensor,
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    pre_activation: Tensor,
    permutation: Tensor,
    grad_x: Tensor | None,
    grad_up_weight: Tensor | None,
    grad_up_bias: Tensor | None,
    grad_down_weight: Tensor | None,
    grad_down_bias: Tensor | None,
    *,
    need_routing: bool,
    single: bool,
) -> Tensor | None:
    """Fills the gradients that are not None, x's by choice; see `backward_kernel`. Three launches unless `single`.

    Returns:
        If `need_routing`, the gradient of the routing weights by grouped row, without what the down bias adds to it,
        in pieces to be summed: float32 `[pieces, R]`.
    """
    tile = layer.tile("backward")
    num_blocks = layer.num_blocks(tile.block_m)
    num_up = up_weight.shape[1]

    def tiles(width: int, block: int = tile.block_n) -> int:
        return ceil_div(width, block)

    need_pre = need_routing or any(
        grad is not None for grad in (grad_x, grad_up_weight, grad_up_bias, grad_down_weight)
    )
    pre_tickets = num_blocks * tiles(layer.d_ff) if need_pre else 0
    need_weights = grad_up_weight is not None or grad_down_weight is not None
    sum_tickets = num_blocks * tiles(layer.d_model) if need_weights or grad_down_bias is not None else 0
    bias_tickets = layer.num_experts * (
        (tiles(num_up) if grad_up_bias is not None else 0) + (tiles(layer.d_model) if grad_down_bias is not None else 0)
    )
    down_tiles = layer.num_experts * tiles(layer.d_model, tile.block_m) * tiles(layer.d_ff)
    up_tiles = layer.num_experts * tiles(num_up, tile.block_m) * tiles(layer.d_model)
    # Tiles of the weights are the longest: split them until there are two for each program. Counted as if all were
    # asked for, and all multiprocessors were there: how a sum is split decides about its last bits.
    steps = ceil_div(layer.num_rows, layer.num_experts * tile.block_k)
    wanted = 2 * layer.programs(tile) // (down_tiles + up_tiles)
    num_splits = max(1, min(wanted, _MAX_SPLITS, steps // _MIN_SPLIT_STEPS))
    down_tiles = 0 if grad_down_weight is None else down_tiles
    up_tiles = 0 if grad_up_weight is None else up_tiles
    x_tickets = num_blocks * tiles(layer.d_model) if grad_x is not None else 0
    ends = list(
        itertools.accumulate(
            (pre_tickets, sum_tickets, bias_tickets, down_tiles * num_splits, up_tiles * num_splits, x_tickets)
        )
    )

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    grad_pre = scratch(layer.num_rows, num_up, dtype=x.dtype) if need_pre else None
    hidden = scratch(layer.num_rows, layer.d_ff, dtype=x.dtype) if need_pre else None
    grouped_grad_y, grouped_x = (
        scratch(layer.num_rows, layer.d_model, dtype=x.dtype) if sum_tickets else None for _ in range(2)
    )
    partial_up = scratch(num_blocks, num_up) if grad_up_bias is not None else None
    partial_routing = scratch(tiles(layer.d_ff), layer.num_rows) if need_routing else None
    partial_down = scratch(num_blocks, layer.d_model) if grad_down_bias is not None else None
    partial_weight = None
    if num_splits > 1:
        partial_weight = scratch((down_tiles + up_tiles) * num_splits, tile.block_m, tile.block_n)
    num_counters = FIRST_COUNTER.value + layer.num_experts + (down_tiles + up_tiles if num_splits > 1 else 0)
    ranges = [(0, ends[-1])] if single else [(0, ends[1]), (ends[1], ends[4]), (ends[4], ends[5])]
    for first_ticket, end_ticket in ranges:
        if first_ticket == end_ticket:
            continue
        num_tickets = end_ticket - first_ticket
        with zeroed_counters(num_counters, x.device) as counters:
            backward_kernel[layer.grid(num_tickets, tile)](
                grad_y,
                x,
                up_weight,
                down_weight,
                pre_activation,
                permutation,
                # What no ticket asks for is replaced by something of its type.
                grad_x=_first_of(grad_x, x),
                grad_up_weight=_first_of(grad_up_weight, grad_down_weight, up_weight),
                grad_up_bias=_first_of(grad_up_bias, up_weight),
                grad_down_weight=_first_of(grad_down_weight, grad_up_weight, up_weight),
                grad_down_bias=_first_of(grad_down_bias, up_weight),
                grad_pre=_first_of(grad_pre, x),
                hidden=_first_of(hidden, x),
                grouped_grad_y=_first_of(grouped_grad_y, x),
                grouped_x=_first_of(grouped_x, x),
                partial_routing=partial_routing,
                partial_up=partial_up,
                partial_down=partial_down,
                partial_weight=partial_weight,
                counters=counters,
                groups=layer.groups(tile.block_m),
                num_blocks=num_blocks,
                num_splits=num_splits,
                num_counters=num_counters,
                first_ticket=first_ticket,
                end_pre=ends[0],
                end_sums=ends[1],
                end_biases=ends[2],
                end_down=ends[3],
                end_up=ends[4],
                end_ticket=end_ticket,
                SINGLE=single,
                EVEN_K=layer.d_model % tile.block_k == 0 and layer.d_ff % tile.block_k == 0,
                ALIGNED=layer.aligned,
                AHEAD=tile.per_multiprocessor == 1 and not layer.tight,
                **layer.arguments,
                **tile.launch_options(),
            )
    return partial_routing


def _first_of(*tensors: Tensor | None) -> Tensor:
    return next(tensor for tensor in tensors if tensor is not None)
