"""The forward in two launches, one a projection: tiles in a fixed order, nobody waits.

Two levers of a GPU with a tensor memory accelerator (TMA) are tried here, each behind a switch of `configs.Tile`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .boxes import box_of_rows, box_of_weights, multiply_boxes
from .configs import Tile, ceil_div
from .epilogues import store_rows, store_up
from .launch import Launch
from .layer import Layer
from .permutation import fill, load_seed, tokens_of_rows
from .tiles import NUMBERS, block_of_tile, load_choices, multiply_rows, rows_of_block, widths


@triton.jit(do_not_specialize=NUMBERS)
def half_kernel(
    a,  # up: x [T, D]; down: hidden [R, F], by grouped row
    b,  # up: up_weight [E, F or 2F, D]; down: down_weight [E, D, F]
    bias,  # [E, F or 2F] or [E, D], or None
    y,  # down: [R, D], by choice
    pre_activation,  # up: [R, F or 2F], by grouped row, or None
    hidden,  # up: [R, F], by grouped row, or None
    permutation,  # int32 [R]; written if DEAL, else read
    groups,  # table of given groups, see groups.py, or None: equal groups
    routing_weights,  # [R], by choice, or None
    tables,  # up: of codec.py, or None
    seed,  # int64 [1] or None: the halves
    seed_low, seed_high, radix_a, radix_b, rounds,
    threshold,  # uint32 bits: dropped below it
    scale, num_rows, num_kept, num_experts, num_blocks,
    group,  # row blocks that share the weights' columns
    d_model, d_ff,
    IS_UP: tl.constexpr,
    DEAL: tl.constexpr,
    TOP_K: tl.constexpr,  # R = T · TOP_K
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr,
    BITS: tl.constexpr,  # of what is kept of pre_activation; 0: it is kept as it is
    FIRST: tl.constexpr, FIXED: tl.constexpr,  # see `codec.store_encoded`
    EVEN_K: tl.constexpr,  # BLOCK_K divides D and F
    ALIGNED: tl.constexpr,  # 8 divides D and F
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr, BOXES: tl.constexpr,  # see `configs.Tile`; with BOXES b, and hidden as a, are descriptors
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """hidden = activation(x[permutation] @ up_weightᵀ + bias), or y[permutation] = hidden @ down_weightᵀ + bias.

    Grid: any number of programs; as many as run at once is best.
    """
    d_model, d_ff, num_up = widths(d_model, d_ff, ALIGNED, GATED)
    pairs: tl.constexpr = GATED and IS_UP  # of a gate and a value, side by side in a tile
    columns: tl.constexpr = BLOCK_N // 2 if pairs else BLOCK_N  # of the result
    size_k, size_n, size = (d_model, num_up, d_ff) if IS_UP else (d_ff, d_model, d_model)
    tiles = tl.cdiv(size, columns)
    key = load_seed(seed, seed_low, seed_high) if DEAL or DROPOUT else 0
    n = tl.arange(0, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_blocks * tiles, tl.num_programs(0), flatten=FLAT):
        block, column_tile = block_of_tile(tile, tiles, num_blocks, group)
        expert, first_row, end = rows_of_block(block, groups, num_rows, num_experts, num_blocks, BLOCK_M)
        # Without rows the product has no steps. But loops are made one only if the inner has always as many.
        end_k = size_k if FLAT else tl.where(first_row < end, size_k, 0)
        row = first_row + tl.arange(0, BLOCK_M)
        source = tl.maximum(tl.minimum(row, end - 1), 0)  # past the end, work on the last row again
        if not IS_UP:
            a_row = source
        elif DEAL:
            a_row = tokens_of_rows(source, num_rows, radix_a, radix_b, rounds, key)
            if column_tile == 0:
                tl.store(permutation + row, a_row, mask=row < end)
        else:
            a_row = load_choices(permutation, source, groups, num_rows) // TOP_K
        first_column = column_tile * columns
        if pairs:
            b_row = tl.minimum(first_column + n // 2, d_ff - 1) + n % 2 * d_ff
        else:
            b_row = tl.minimum(first_column + n, size_n - 1)
        # Loaded before the product, so that nobody waits for it after.
        of_columns = tl.zeros((BLOCK_N,), tl.float32)
        if bias is not None:
            of_columns += tl.load(bias + expert.to(tl.int64) * size_n + b_row).to(tl.float32)
        if BOXES:
            acc = multiply_boxes(
                a, b, a_row, first_row, expert, first_column, end_k, size_k, not IS_UP, True, pairs, EVEN_K,
                PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            acc = multiply_rows(a, b, a_row, b_row, expert, end_k, size_k, size_n, True, EVEN_K, PRECISION, BLOCK_K)
        if IS_UP:
            store_up(
                acc, of_columns, row, end, first_column, pre_activation, hidden, tables, num_kept, key,
                threshold, scale, d_ff, ACTIVATION, GATED, DROPOUT, BITS, FIRST, FIXED, BLOCK_M, BLOCK_N, PARTS,
            )  # fmt: skip
        else:
            choice = load_choices(permutation, source, groups, num_rows)
            factor = None
            if routing_weights is not None:
                factor = tl.load(routing_weights + choice).to(tl.float32)
            store_rows(acc, of_columns, row, end, choice, first_column, factor, y, d_model, BLOCK_M, BLOCK_N, PARTS)


def launch_up(layer: Layer, pre_activation: Tensor | None, hidden: Tensor | None) -> None:
    """Fills those that are not None, and a permutation that is not given."""
    launch, tile = layer.kept(_plan, "forward up", pre_activation is not None, hidden is not None)
    tensors = layer.tensors
    if tile.flat and layer.is_dealt:
        # Triton leaves loops apart where there is a third one, the deal's.
        fill(*(tensors[name] for name in ("permutation", "seed", "seed_low", "seed_high")))
    x, up_weight, bias = tensors["x"], tensors["up_weight"], tensors["up_bias"]
    b = box_of_weights(up_weight, tile, True, layer.problem.gated) if tile.boxes else up_weight
    groups = layer.groups(launch.rows)
    launch(tensors, a=x, b=b, bias=bias, y=None, pre_activation=pre_activation, hidden=hidden, groups=groups)


def launch_down(layer: Layer, y: Tensor, hidden: Tensor) -> None:
    """Fills y, by choice."""
    launch, tile = layer.kept(_plan, "forward down")
    down_weight, bias = layer.tensors["down_weight"], layer.tensors["down_bias"]
    operands: tuple[Any, Any] = (hidden, down_weight)
    if tile.boxes:
        operands = box_of_rows(hidden, tile), box_of_weights(down_weight, tile, True, False)
    a, b = operands
    groups = layer.groups(launch.rows)
    launch(layer.tensors, a=a, b=b, bias=bias, y=y, pre_activation=None, hidden=None, groups=groups)


def _plan(layer: Layer, phase: str, *is_there: bool) -> tuple[Launch, Tile]:
    """The launch and its tile; another one where other outputs are asked for."""
    problem, tile, is_up = layer.problem, layer.tile(phase), phase == "forward up"
    num_blocks = layer.num_blocks(tile.block_m)
    up_tiles = ceil_div(problem.d_ff, tile.block_n // 2 if problem.gated else tile.block_n)
    tiles = up_tiles if is_up else ceil_div(problem.d_model, tile.block_n)
    # For both halves as many as were measured: enough up tiles to keep all programs busy.
    group = min(num_blocks, ceil_div(layer.grid(num_blocks * tiles, tile), up_tiles))
    arguments = {"group": group, "IS_UP": is_up, "DEAL": is_up and layer.is_dealt and not tile.flat}
    return layer.launch(half_kernel, num_blocks * tiles, tile, tile.block_m, arguments), tile
