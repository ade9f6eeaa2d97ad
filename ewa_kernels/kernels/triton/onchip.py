"""The forward for small D, in one launch, with hidden never leaving the chip: no queue, nothing to wait for."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, dropout_scale
from .codec import store_encoded
from .epilogues import store_rows
from .launch import Launch
from .layer import Layer
from .permutation import load_seed, tokens_of_rows
from .tiles import NUMBERS, load_choices, multiply, rows_of_block, widths


@triton.jit
def _up(
    x_tile, up_weight, up_bias, pre_activation, row, end, weight_row, first_column, column, first_row_of_expert, d,
    tables, num_kept, d_model, d_ff, num_up, PART: tl.constexpr, GATED: tl.constexpr, BITS: tl.constexpr,
    FIRST: tl.constexpr, FIXED: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """pre = x @ up_weight[weight_row]ᵀ + bias, stored; `[BLOCK_M, BLOCK_F]`."""
    source = (first_row_of_expert + tl.minimum(weight_row, num_up - 1))[:, None] * d_model + d[None, :]
    if EVEN_D:
        weight = tl.load(up_weight + source)
    else:
        weight = tl.load(up_weight + source, mask=(d < d_model)[None, :], other=0.0)
    zero = tl.zeros((x_tile.shape[0], weight.shape[0]), tl.float32)
    pre = multiply(x_tile, weight.T, zero, PRECISION)
    if up_bias is not None:
        bias = tl.load(up_bias + first_row_of_expert + weight_row, mask=column < d_ff, other=0.0)
        pre += bias.to(tl.float32)[None, :]
    if pre_activation is not None:
        inside = (row < end)[:, None] & (column < d_ff)[None, :]
        if BITS > 0:
            store_encoded(
                pre_activation, pre, row, row < end, first_column, tables, num_kept, d_ff, PART, GATED, BITS, FIRST,
                FIXED, pre.shape[0], pre.shape[1],
            )  # fmt: skip
        else:
            tl.store(pre_activation + row.to(tl.int64)[:, None] * num_up + weight_row[None, :], pre, mask=inside)
    return pre


@triton.jit(do_not_specialize=NUMBERS)
def onchip_kernel(
    x,  # [T, D]
    up_weight,  # [E, F or 2F, D]
    up_bias,  # [E, F or 2F] or None
    down_weight,  # [E, D, F]
    down_bias,  # [E, D] or None
    y,  # [R, D]
    pre_activation,  # [R, F or 2F], by grouped row, or None
    permutation,  # int32 [R]; written if DEAL, else read
    groups,  # table of given groups, see groups.py, or None: equal groups
    routing_weights,  # [R], by choice, or None
    tables,  # of codec.py, or None
    seed,  # int64 [1] or None: the halves
    seed_low, seed_high, radix_a, radix_b, rounds,
    threshold,  # uint32 bits: dropped below it
    scale, num_rows, num_kept, num_experts, num_blocks, d_model, d_ff,
    DEAL: tl.constexpr,
    TOP_K: tl.constexpr,  # R = T · TOP_K
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr,
    BITS: tl.constexpr,  # of what is kept of pre_activation; 0: it is kept as it is
    FIRST: tl.constexpr, FIXED: tl.constexpr,  # see `codec.store_encoded`
    EVEN_D: tl.constexpr,  # BLOCK_K = D
    ALIGNED: tl.constexpr,  # 8 divides D and F
    EVEN_F: tl.constexpr,  # BLOCK_N divides F
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of hidden at a time
    BLOCK_K: tl.constexpr,  # power of two ≥ D
    PARTS: tl.constexpr,
):  # fmt: skip
    """y of a row block: for each BLOCK_N columns of hidden, up projection, activation, and a piece of the down one.

    Grid: any number of programs; as many as run at once is best.
    """
    d_model, d_ff, num_up = widths(d_model, d_ff, ALIGNED, GATED)
    key = load_seed(seed, seed_low, seed_high) if DEAL or DROPOUT else 0
    d = tl.arange(0, BLOCK_K)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        expert, first_row, end = rows_of_block(block, groups, num_rows, num_experts, num_blocks, BLOCK_M)
        if first_row < end:
            row = first_row + tl.arange(0, BLOCK_M)
            source = tl.minimum(row, end - 1)  # past the end, work on the last row again
            if DEAL:
                choice = tokens_of_rows(source, num_rows, radix_a, radix_b, rounds, key)
                tl.store(permutation + row, choice, mask=row < end)
            else:
                choice = load_choices(permutation, source, groups, num_rows)
            x_tile = tl.load(
                x + (choice // TOP_K).to(tl.int64)[:, None] * d_model + d[None, :],
                mask=(d < d_model)[None, :],
                other=0.0,
            )
            up_row = expert.to(tl.int64) * num_up
            down_row = expert.to(tl.int64) * d_model + tl.minimum(d, d_model - 1)
            acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for first_column in range(0, d_ff, BLOCK_N):
                column = first_column + tl.arange(0, BLOCK_N)
                pre = _up(
                    x_tile, up_weight, up_bias, pre_activation, row, end, column, first_column, column, up_row, d,
                    tables, num_kept, d_model, d_ff, num_up, 0, GATED, BITS, FIRST, FIXED, EVEN_D, PRECISION,
                )  # fmt: skip
                hidden = activate(pre, ACTIVATION)
                if GATED:
                    hidden *= _up(
                        x_tile, up_weight, up_bias, pre_activation, row, end, d_ff + column, first_column, column,
                        up_row, d, tables, num_kept, d_model, d_ff, num_up, 1, GATED, BITS, FIRST, FIXED, EVEN_D,
                        PRECISION,
                    )  # fmt: skip
                if DROPOUT:
                    hidden *= dropout_scale(row, column, key, threshold, scale)
                weight_index = down_row[:, None] * d_ff + column[None, :]
                if EVEN_F:
                    weight = tl.load(down_weight + weight_index)
                else:
                    weight = tl.load(down_weight + weight_index, mask=(column < d_ff)[None, :], other=0.0)
                    # Columns that do not exist hold copies of others: not zero, and perhaps not finite.
                    hidden = tl.where((column < d_ff)[None, :], hidden, 0.0)
                acc = multiply(hidden.to(weight.dtype), weight.T, acc, PRECISION)
            if down_bias is not None:
                acc += tl.load(down_bias + down_row).to(tl.float32)[None, :]
            factor = None
            if routing_weights is not None:
                factor = tl.load(routing_weights + choice).to(tl.float32)
            store_rows(acc, None, row, end, choice, 0, factor, y, d_model, BLOCK_M, BLOCK_K, PARTS)


def launch_onchip(layer: Layer, y: Tensor, pre_activation: Tensor | None) -> None:
    """Fills y, by choice, pre_activation unless it is None, and a permutation that is not given."""
    launch = layer.kept(_plan, pre_activation is not None)
    launch(layer.tensors, y=y, pre_activation=pre_activation, groups=layer.groups(launch.rows))


def _plan(layer: Layer, *is_there: bool) -> Launch:
    """Another one where other outputs are asked for."""
    tile = layer.onchip_tile()
    assert tile is not None
    problem = layer.problem
    arguments = {"EVEN_D": problem.d_model == tile.block_k, "EVEN_F": problem.d_ff % tile.block_n == 0}
    return layer.launch(onchip_kernel, layer.num_blocks(tile.block_m), tile, tile.block_m, arguments)
