"""The forward in one launch: deal, gather, up projection, activation, down projection, scatter."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..counters import give_back, zeroed_counters
from .configs import ceil_div
from .epilogues import store_rows, store_up
from .launch import Launch
from .layer import Layer
from .permutation import load_seed, tokens_of_rows
from .queue import FIRST_COUNTER, draw_ticket, leave_clean, signal, wait_until
from .tiles import NUMBERS, load_choices, multiply_rows, rows_of_block, widths


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    x,  # [T, D]
    up_weight,  # [E, F or 2F, D]
    up_bias,  # [E, F or 2F] or None
    down_weight,  # [E, D, F]
    down_bias,  # [E, D] or None
    y,  # [R, D]
    pre_activation,  # [R, F or 2F], by grouped row, or None
    hidden,  # [R, F], by grouped row
    permutation,  # int32 [R]; written if DEAL, else read
    groups,  # table of given groups, see groups.py, or None: equal groups
    routing_weights,  # [R], by choice, or None
    counters,
    tables,  # of codec.py, or None
    seed,  # int64 [1] or None: the halves
    seed_low, seed_high, radix_a, radix_b, rounds,
    threshold,  # uint32 bits: dropped below it
    scale, num_rows, num_kept, num_experts, num_blocks,
    group,  # row blocks whose down tiles follow the up tiles of the next as many
    num_counters, d_model, d_ff,
    DEAL: tl.constexpr,
    TOP_K: tl.constexpr,  # R = T · TOP_K
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr,
    BITS: tl.constexpr,  # of what is kept of pre_activation; 0: it is kept as it is
    FIRST: tl.constexpr, FIXED: tl.constexpr,  # see `codec.store_encoded`
    EVEN_K: tl.constexpr,  # BLOCK_K divides D and F
    ALIGNED: tl.constexpr,  # 8 divides D and F
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr, BACKOFF: tl.constexpr,  # see `configs.Tile`
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Tiles of up (rows × hidden columns) and of down (rows × D), as the tickets come.

    R grouped rows, one for each of a token's TOP_K choices; y is by choice.
    Tickets: the up tiles of the first `group` row blocks; then, again and again, the up tiles of the next `group`
    and the down tiles of the one before, whose hidden is still in the L2 cache.

    Grid: any number of programs; as many as run at once is best.
    """
    d_model, d_ff, num_up = widths(d_model, d_ff, ALIGNED, GATED)
    up_columns: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N  # hidden columns of an up tile
    up_tiles = tl.cdiv(d_ff, up_columns)
    down_tiles = tl.cdiv(d_model, BLOCK_N)
    num_groups = tl.cdiv(num_blocks, group)
    key = load_seed(seed, seed_low, seed_high) if DEAL or DROPOUT else 0

    tiles = up_tiles + down_tiles  # of a row block
    ticket = draw_ticket(counters)
    while ticket < num_groups * group * tiles:
        if EARLY:
            next_ticket = draw_ticket(counters)
        # Which tile: neighbours in a group share the weights' columns.
        lead = group * up_tiles
        later = tl.maximum(ticket - lead, 0)
        step = later // (group * tiles)
        rest = later - step * (group * tiles)
        last = step == num_groups - 1  # no up tiles are left
        is_up = (ticket < lead) | ((rest < lead) & (step < num_groups - 1))
        which_group = tl.where(ticket < lead, 0, tl.where(is_up, step + 1, step))
        rest = tl.where(ticket < lead, ticket, tl.where(is_up | last, rest, rest - lead))
        column_tile = rest // group
        block = which_group * group + rest - column_tile * group
        expert, first_row, end = rows_of_block(block, groups, num_rows, num_experts, num_blocks, BLOCK_M)
        if (block < num_blocks) & (first_row < end):
            row = first_row + tl.arange(0, BLOCK_M)
            source = tl.minimum(row, end - 1)  # past the end, work on the last row again
            if is_up:
                if DEAL:
                    a_row = tokens_of_rows(source, num_rows, radix_a, radix_b, rounds, key)
                    if column_tile == 0:
                        tl.store(permutation + row, a_row, mask=row < end)
                else:
                    a_row = load_choices(permutation, source, groups, num_rows) // TOP_K
            else:
                wait_until(counters + FIRST_COUNTER + block, up_tiles, BACKOFF)
                a_row = source

            # One loop for both products: two would be merged at their ends, and no longer overlap with the loads.
            size_k = tl.where(is_up, d_model, d_ff)
            size_n = tl.where(is_up, num_up, d_model)
            a = tl.where(is_up, x, hidden)
            b = tl.where(is_up, up_weight, down_weight)
            n = tl.arange(0, BLOCK_N)
            if GATED:
                b_row = tl.where(
                    is_up,
                    tl.minimum(column_tile * up_columns + n // 2, d_ff - 1) + n % 2 * d_ff,
                    tl.minimum(column_tile * BLOCK_N + n, d_model - 1),
                )
            else:
                b_row = tl.minimum(column_tile * BLOCK_N + n, size_n - 1)
            # Loaded before the products, so that nobody waits for them after.
            bias = tl.zeros((BLOCK_N,), tl.float32)
            bias_index = expert.to(tl.int64) * size_n + b_row
            if up_bias is not None:
                bias += tl.load(up_bias + bias_index, mask=tl.where(is_up, n, -1) >= 0, other=0.0).to(tl.float32)
            if down_bias is not None:
                bias += tl.load(down_bias + bias_index, mask=tl.where(is_up, -1, n) >= 0, other=0.0).to(tl.float32)
            acc = multiply_rows(a, b, a_row, b_row, expert, size_k, size_k, size_n, True, EVEN_K, PRECISION, BLOCK_K)

            if is_up:
                store_up(
                    acc, bias, row, end, column_tile * up_columns, pre_activation, hidden, tables,
                    num_kept, key, threshold, scale, d_ff, ACTIVATION, GATED, DROPOUT, BITS, FIRST, FIXED, BLOCK_M,
                    BLOCK_N, PARTS,
                )  # fmt: skip
                signal(counters + FIRST_COUNTER + block)
            else:
                choice = load_choices(permutation, source, groups, num_rows)
                factor = None
                if routing_weights is not None:
                    factor = tl.load(routing_weights + choice).to(tl.float32)
                store_rows(
                    acc, bias, row, end, choice, column_tile * BLOCK_N, factor, y, d_model, BLOCK_M, BLOCK_N, PARTS
                )
        ticket = next_ticket if EARLY else draw_ticket(counters)
    leave_clean(counters, num_counters)


def launch_forward(layer: Layer, y: Tensor, pre_activation: Tensor | None, hidden: Tensor) -> None:
    """Fills y, by choice, hidden, pre_activation if it is not None, and a permutation that is not given."""
    num_counters, launch = layer.kept(_plan, pre_activation is not None)
    counters, whose = zeroed_counters(num_counters, layer.problem.device)
    groups = layer.groups(launch.rows)
    launch(layer.tensors, y=y, pre_activation=pre_activation, hidden=hidden, groups=groups, counters=counters)
    give_back(counters, whose)


def _plan(layer: Layer, is_kept: bool) -> tuple[int, Launch]:
    """How many counters it takes, and the launch; another one where pre_activation is asked for."""
    problem, tile = layer.problem, layer.tile("forward")
    num_blocks = layer.num_blocks(tile.block_m)
    up_tiles = ceil_div(problem.d_ff, tile.block_n // 2 if problem.gated else tile.block_n)
    num_tiles = num_blocks * (up_tiles + ceil_div(problem.d_model, tile.block_n))
    num_counters = FIRST_COUNTER.value + num_blocks
    # Enough up tiles in a group to keep all programs busy: its down tiles find hidden ready then.
    group = min(num_blocks, ceil_div(layer.grid(num_tiles, tile), up_tiles))
    arguments = {"group": group, "num_counters": num_counters}
    return num_counters, layer.launch(forward_kernel, num_tiles, tile, tile.block_m, arguments)
