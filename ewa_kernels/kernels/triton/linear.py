"""A linear layer by experts: rows are looked up where they are loaded, and put in their places where they are stored.

See `kernels/linear.py`. The gradients of weight and bias are by the kernel of the layer's backward, from rows that lie
by grouped row: its products would not have them in time if each step looked them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Deal, Inputs, Places, Problem
from ..copies import in_dtype
from ..counters import give_back, zeroed_counters
from ..devices import on_device
from . import rows
from .backward import splits
from .backward_weights import weights_kernel
from .configs import ROWS, aligned, ceil_div
from .cublas import rows_tile
from .epilogues import store_rows
from .launch import Launch
from .layer import Layer, check_sizes
from .moe_ffn import warn_once_of_copies
from .queue import FIRST_COUNTER
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
def linear_kernel(
    source,  # [R, K], by token if GATHER, else by grouped row
    weight,  # [E, N, K] if TRANSPOSED, else [E, K, N]
    bias,  # [E, N] or None
    out,  # [R, N], by token if SCATTER, else by grouped row
    permutation,  # int32 [R]
    groups,  # table of given groups, see groups.py
    num_rows, num_experts, num_blocks,
    d_model, d_ff,  # K and N if TRANSPOSED, else N and K
    GATHER: tl.constexpr, SCATTER: tl.constexpr, TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides K
    ALIGNED: tl.constexpr,  # 8 divides K and N
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out = source @ weightᵀ + bias, or source @ weight, by the weight of each row's expert.

    Grid: any number of programs; as many as run at once is best.
    """
    d_model, d_ff, _ = widths(d_model, d_ff, ALIGNED, False)
    size_k, size_n = (d_model, d_ff) if TRANSPOSED else (d_ff, d_model)
    tiles = tl.cdiv(size_n, BLOCK_N)
    for tile in range(tl.program_id(0), num_blocks * tiles, tl.num_programs(0)):
        block, column_tile = block_of_tile(tile, tiles, num_blocks)
        expert, first_row, end = rows_of_block(block, groups, num_rows, num_experts, num_blocks, BLOCK_M)
        row = first_row + tl.arange(0, BLOCK_M)
        existing = tl.maximum(tl.minimum(row, end - 1), 0)  # past the end, work on the last row again
        token = existing
        if GATHER or SCATTER:
            token = load_choices(permutation, existing, groups, num_rows)
        first_column = column_tile * BLOCK_N
        n = clamp_columns(first_column + tl.arange(0, BLOCK_N), size_n, ALIGNED)
        # Loaded before the product, so that nobody waits for it after.
        of_columns = None
        if bias is not None:
            of_columns = tl.load(bias + expert.to(tl.int64) * size_n + n).to(tl.float32)
        end_k = tl.where(first_row < end, size_k, 0)  # without rows the product has no steps
        acc = multiply_rows(
            source, weight, token if GATHER else existing, n, expert, end_k, size_k, size_n, TRANSPOSED, EVEN_K,
            PRECISION, BLOCK_K,
        )  # fmt: skip
        target = token if SCATTER else existing
        store_rows(acc, of_columns, row, end, target, first_column, None, out, size_n, BLOCK_M, BLOCK_N, PARTS)


def prepared(problem: Problem, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Contiguous and aligned, the weight in x's dtype. The bias keeps its own."""
    weight = in_dtype(weight, problem.dtype).contiguous()
    if weight.data_ptr() % 16:
        warn_once_of_copies()
    return aligned(weight), None if bias is None else aligned(bias.contiguous())


def forward(problem: Problem, places: Places, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `kernels/linear.py`."""
    with on_device(x):
        x = aligned(x.contiguous())
        return _times(_layer(problem, places, x, weight), x, places.gather, weight, True, bias, places.scatter)


def backward(
    problem: Problem, places: Places, grad_out: Tensor, x: Tensor | None, weight: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """See `kernels/linear.py`."""
    need_x, need_weight, need_bias = needed
    grad_x: Tensor | None = None
    grads: list[Tensor | None] = [None, None]
    with on_device(weight):
        grad_out = aligned(grad_out.contiguous())
        layer = _layer(problem, places, grad_out, weight)
        if need_x:
            grad_x = _times(layer, grad_out, places.scatter, weight, False, None, places.gather)
        if need_weight or need_bias:
            x = aligned(x.contiguous()) if need_weight and x is not None else None
            grads = _outer(layer, places, grad_out, x, need_bias)
    return [grad_x, *grads]


def _layer(problem: Problem, places: Places, rows: Tensor, weight: Tensor) -> Layer:
    """Of which the up projection alone is looked at."""
    check_sizes(problem, "weight")
    inputs = Inputs(rows, weight, None, weight, None, None)
    return Layer(problem, inputs, Deal(None, places.permutation, places.expert_offsets))


def _times(
    layer: Layer, source: Tensor, gather: bool, weight: Tensor, transposed: bool, bias: Tensor | None, scatter: bool
) -> Tensor:
    launch = layer.kept(_times_plan, gather, transposed, scatter, bias is None)
    out = source.new_empty(layer.problem.num_rows, weight.shape[1] if transposed else weight.shape[2])
    launch(layer.tensors, groups=layer.groups(launch.rows), source=source, weight=weight, bias=bias, out=out)
    return out


def _times_plan(layer: Layer, gather: bool, transposed: bool, scatter: bool, _has_no_bias: bool) -> Launch:
    problem, tile = layer.problem, layer.tile("forward up" if transposed else "backward x")
    size_n = problem.d_ff if transposed else problem.d_model
    num_tiles = layer.num_blocks(tile.block_m) * ceil_div(size_n, tile.block_n)
    arguments = {"GATHER": gather, "SCATTER": scatter, "TRANSPOSED": transposed}
    return layer.launch(linear_kernel, num_tiles, tile, tile.block_m, arguments, **_options(layer))


def _options(layer: Layer) -> dict[str, int]:
    """ptxas would stop at 128 registers, for more programs at a time than there are, and spill (float16, sm_86)."""
    return {} if layer.is_aligned else {"maxnreg": 255}


def _outer(layer: Layer, places: Places, grad_out: Tensor, x: Tensor | None, need_bias: bool) -> list[Tensor | None]:
    """Gradients of the weight, if there is x, and of the bias."""
    problem, weight = layer.problem, layer.tensors["up_weight"]
    _, weight_dtype, bias_dtype = problem.input_dtypes
    launch, num_counters, num_partial = layer.kept(_outer_plan, x is not None, need_bias)
    grad_weight = None if x is None else torch.empty_like(weight, dtype=weight_dtype)
    grad_bias = weight.new_empty(weight.shape[:2], dtype=bias_dtype) if need_bias else None
    sums = weight.new_empty(layer.num_blocks(ROWS), problem.d_ff, dtype=torch.float32) if need_bias else None
    if x is not None:
        x = _by_grouped_row(layer, x, problem.d_model, places.gather, None)
    grad_out = _by_grouped_row(layer, grad_out, problem.d_ff, places.scatter, sums)
    counters, whose = zeroed_counters(num_counters, weight.device)
    partial_weight = weight.new_empty(num_partial, dtype=torch.float32) if num_partial > 0 else None
    # What no tile asks for is replaced by something of its type, or None.
    unused, of_weight = grad_out if x is None else x, weight if grad_weight is None else grad_weight
    launch(
        dict.fromkeys(("hidden", "grouped_grad_y", "grouped_x"), unused),
        groups=layer.groups(ROWS),
        grad_pre=grad_out,
        partial_up=sums,
        partial_down=None,
        partial_weight=partial_weight,
        grad_up_weight=of_weight,
        grad_up_bias=of_weight if grad_bias is None else grad_bias,
        grad_down_weight=of_weight,
        grad_down_bias=of_weight,
        counters=counters,
    )
    give_back(counters, whose)
    return [grad_weight, grad_bias]


def _outer_plan(layer: Layer, need_weight: bool, need_bias: bool) -> tuple[Launch, int, int]:
    """The launch, how many counters it takes, and how many floats in which parts of sums are kept."""
    problem, tile = layer.problem, layer.tile("backward weights")
    weight_tiles = problem.num_experts * ceil_div(problem.d_ff, tile.block_m) * ceil_div(problem.d_model, tile.block_n)
    num_splits = splits(layer, tile, weight_tiles)
    end_biases = need_bias * problem.num_experts * ceil_div(problem.d_ff, tile.block_n)
    num_parts = need_weight * weight_tiles * num_splits
    ends = {"end_biases": end_biases, "end_down": end_biases, "end_up": end_biases + num_parts}
    arguments = {**ends, "num_splits": num_splits}
    launch = layer.launch(weights_kernel, ends["end_up"], tile, ROWS, arguments, **_options(layer))
    num_counters = FIRST_COUNTER.value + problem.num_experts + need_weight * weight_tiles
    return launch, num_counters, num_parts * tile.block_m * tile.block_n if num_splits > 1 else 0


def _by_grouped_row(layer: Layer, tokens: Tensor, width: int, is_by_token: bool, sums: Tensor | None) -> Tensor:
    """The same by grouped row, if it is by token; fills `sums`, if not None, with those over the rows of each block."""
    if not is_by_token and sums is None:
        return tokens
    grouped = torch.empty_like(tokens) if is_by_token else None
    launch = layer.kept(_rows_plan, width, is_by_token, sums is None)
    tensors: dict[str, Any] = {**layer.tensors, "permutation": layer.tensors["permutation"] if is_by_token else None}
    launch(
        tensors,
        groups=layer.groups(ROWS),
        x=None,
        grad_y=tokens,
        grouped_x=None,
        grouped_grad_y=grouped,
        partial_down=sums,
    )
    return tokens if grouped is None else grouped


def _rows_plan(layer: Layer, width: int, _is_by_token: bool, _has_no_sums: bool) -> Launch:
    tile = rows_tile(layer, width)
    numbers = {**layer.numbers(ROWS), "d_model": width, **tile.constants}
    num_programs = layer.num_blocks(ROWS) * ceil_div(width, tile.columns)
    return Launch(rows.gather_kernel, num_programs, numbers, tile, ROWS)
