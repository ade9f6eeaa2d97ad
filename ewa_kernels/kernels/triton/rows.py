"""Passes over rows between matrix products that a library makes: gather, activation, its backward, scatter, sums.

Each reads and writes memory once. Rows lie in `slots`: where groups are equal, an expert has ⌈R/E⌉ of them, so that one
batched product takes all; its last slot may have no row. What is read from it, and so what products make of it, is 0.
Where groups are given, slots are grouped rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, activate_with_slope, dropout_scale
from .backward_weights import bias_tile
from .codec import store_encoded
from .epilogues import load_pre
from .permutation import load_seed, tokens_of_rows
from .tiles import NUMBERS, load_choices, rows_of_block, rows_of_expert, widths


@triton.jit
def _work(num_columns, groups, num_rows, num_experts, num_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What a program has: a row block, of an expert, from a first row to the expert's end, and to the end of the
    block's slots; what to add to a row for its slot; a column tile, and its columns."""
    tiles = tl.cdiv(num_columns, COLUMNS)
    block = tl.program_id(0) // tiles
    column_tile = tl.program_id(0) - block * tiles
    expert, first, end = rows_of_block(block, groups, num_rows, num_experts, num_blocks, ROWS)
    if groups is not None:
        to_slot, end_of_slots = 0, end
    else:
        start, _ = rows_of_expert(expert, groups, num_rows, num_experts)
        slots = tl.cdiv(num_rows, num_experts)
        to_slot, end_of_slots = expert * slots - start, start + slots
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    return block, expert, first, end, tl.minimum(first + ROWS, end_of_slots), to_slot, column_tile, column


@triton.jit
def _existing(row, end):
    """Rows before `end`, as there are, for those past it."""
    return tl.maximum(tl.minimum(row, end - 1), 0)


@triton.jit(do_not_specialize=NUMBERS)
def gather_kernel(
    x,  # [T, D], or None
    grad_y,  # [T, D], or None
    permutation,  # int32 [R]; written if DEAL, else read; or None: rows are in order
    groups,  # table of given groups, see groups.py, or None: equal groups
    routing_weights,  # [R], by choice, or None
    grouped_x,  # [slots, D], or None
    grouped_grad_y,  # [slots, D], or None
    partial_down,  # float32 [row blocks, D], or None
    seed, seed_low, seed_high, radix_a, radix_b, rounds, num_rows, num_experts, num_blocks, d_model, d_ff,
    DEAL: tl.constexpr,
    TOP_K: tl.constexpr,  # R = T · TOP_K
    ALIGNED: tl.constexpr,  # 8 divides D and F
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """x and grad_y by slot; partial_down = grad_y (times routing weights) summed over a block's rows.

    Grid: row blocks × ⌈D / COLUMNS⌉.
    """
    d_model, d_ff, _ = widths(d_model, d_ff, ALIGNED, False)
    block, _, first, end, last, to_slot, _, column = _work(
        d_model, groups, num_rows, num_experts, num_blocks, ROWS, COLUMNS
    )
    if DEAL:
        # A row for each thread, once; all programs of a row block write the same, and each reads what it wrote.
        key = load_seed(seed, seed_low, seed_high)
        dealt = first + tl.arange(0, ROWS)
        token = tokens_of_rows(_existing(dealt, end), num_rows, radix_a, radix_b, rounds, key)
        tl.store(permutation + dealt, token, mask=dealt < end)
        tl.debug_barrier()
    total = tl.zeros((STEP, COLUMNS), tl.float32)
    for step in range(first, last, STEP):
        row = step + tl.arange(0, STEP)
        choice = _existing(row, end)
        if permutation is not None:
            choice = load_choices(permutation, choice, groups, num_rows)
        source = (choice // TOP_K).to(tl.int64)[:, None] * d_model + column[None, :]
        target = (row + to_slot).to(tl.int64)[:, None] * d_model + column[None, :]
        exists = (row < end)[:, None] & (column < d_model)[None, :]
        inside = (row < last)[:, None] & (column < d_model)[None, :]
        if grouped_x is not None:
            tl.store(grouped_x + target, tl.load(x + source, mask=exists, other=0.0), mask=inside)
        if grad_y is not None:
            values = tl.load(grad_y + source, mask=exists, other=0.0)
            if grouped_grad_y is not None:
                tl.store(grouped_grad_y + target, values, mask=inside)
            if partial_down is not None:
                values = values.to(tl.float32)
                if routing_weights is not None:
                    values *= tl.load(routing_weights + choice, mask=row < end, other=0.0).to(tl.float32)[:, None]
                total += values
    if partial_down is not None:
        stored = column < tl.where(first < end, d_model, 0)
        tl.store(partial_down + block.to(tl.int64) * d_model + column, tl.sum(total, 0), mask=stored)


@triton.jit(do_not_specialize=NUMBERS)
def activate_kernel(
    product,  # [slots, F or 2F]: pre_activation without its bias
    up_bias,  # [E, F or 2F] or None
    groups,  # table of given groups, see groups.py, or None: equal groups
    hidden,  # [slots, F]
    pre_activation,  # [slots] rows in BITS, or None
    tables,  # of codec.py, or None
    seed, seed_low, seed_high, threshold, scale, num_rows, num_kept, num_experts, num_blocks, d_model, d_ff,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr,
    BITS: tl.constexpr,  # of what is kept of pre_activation; 0: it is kept as it is
    FIRST: tl.constexpr, FIXED: tl.constexpr,  # see `codec.store_encoded`
    ALIGNED: tl.constexpr,  # 8 divides D and F
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """hidden = dropout(act(product + up_bias)), gated act(gate) · value.

    Grid: row blocks × ⌈F / COLUMNS⌉.
    """
    d_model, d_ff, num_up = widths(d_model, d_ff, ALIGNED, GATED)
    _, expert, first, _end, last, to_slot, tile, column = _work(
        d_ff, groups, num_rows, num_experts, num_blocks, ROWS, COLUMNS
    )
    key = load_seed(seed, seed_low, seed_high) if DROPOUT else 0
    gate_bias, value_bias = _load_bias(up_bias, expert, column, d_ff, GATED)
    for step in range(first, last, STEP):
        row = step + tl.arange(0, STEP)
        slot = (row + to_slot).to(tl.int64)[:, None]
        inside = (row < last)[:, None] & (column < d_ff)[None, :]
        gate, value = _load_pre(product + slot * num_up + column[None, :], inside, gate_bias, value_bias, d_ff, GATED)
        if pre_activation is not None:
            first_column = tile * COLUMNS
            store_encoded(
                pre_activation, gate, row + to_slot, row < last, first_column, tables, num_kept, d_ff, 0, GATED, BITS,
                FIRST, FIXED, STEP, COLUMNS,
            )  # fmt: skip
            if GATED:
                store_encoded(
                    pre_activation, value, row + to_slot, row < last, first_column, tables, num_kept, d_ff, 1, GATED,
                    BITS, FIRST, FIXED, STEP, COLUMNS,
                )  # fmt: skip
        result = activate(gate, ACTIVATION)
        if GATED:
            result *= value
        if DROPOUT:
            result *= dropout_scale(row, column, key, threshold, scale)
        tl.store(hidden + slot * d_ff + column[None, :], result, mask=inside)


@triton.jit
def _load_bias(bias, expert, column, d_ff, GATED: tl.constexpr):
    """Of gate and value, float32; 0 without a bias."""
    gate = tl.zeros(column.shape, tl.float32)
    value = gate
    if bias is not None:
        exists = column < d_ff
        bias += expert.to(tl.int64) * (d_ff * 2 if GATED else d_ff)
        gate = tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)
        if GATED:
            value = tl.load(bias + d_ff + column, mask=exists, other=0.0).to(tl.float32)
    return gate, value


@triton.jit
def _load_pre(pointers, inside, gate_bias, value_bias, d_ff, GATED: tl.constexpr):
    """pre_activation's gate and value, float32; not gated, the two are one."""
    gate = tl.load(pointers, mask=inside, other=0.0).to(tl.float32) + gate_bias[None, :]
    value = gate
    if GATED:
        value = tl.load(pointers + d_ff, mask=inside, other=0.0).to(tl.float32) + value_bias[None, :]
    return gate, value


@triton.jit(do_not_specialize=NUMBERS)
def activate_backward_kernel(
    grad_hidden,  # [slots, F]: grad_y @ down_weight
    product,  # [slots, F or 2F]: pre_activation without its bias; in BITS with it
    up_bias,  # [E, F or 2F] or None
    permutation,  # int32 [R]
    groups,  # table of given groups, see groups.py, or None: equal groups
    routing_weights,  # [R], by choice, or None
    grad_pre,  # [slots, F or 2F]; not gated, it may be grad_hidden
    hidden,  # [slots, F], times the routing weight, or None
    partial_up,  # float32 [row blocks, F or 2F], or None
    partial_routing,  # float32 [⌈F / COLUMNS⌉, R], by grouped row, or None
    tables,  # of codec.py, or None
    seed, seed_low, seed_high, threshold, scale, num_rows, num_kept, num_experts, num_blocks, d_model, d_ff,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr,
    BITS: tl.constexpr,  # of what is kept of pre_activation; 0: it is kept as it is
    FIRST: tl.constexpr, FIXED: tl.constexpr,  # see `codec.store_encoded`
    LARGEST: tl.constexpr,  # of x's type
    ALIGNED: tl.constexpr,  # 8 divides D and F
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """grad_pre and hidden once more; grad_pre summed over a block's rows; grad_hidden · hidden for routing weights.

    Grid: row blocks × ⌈F / COLUMNS⌉.
    """
    d_model, d_ff, num_up = widths(d_model, d_ff, ALIGNED, GATED)
    block, expert, first, end, last, to_slot, column_tile, column = _work(
        d_ff, groups, num_rows, num_experts, num_blocks, ROWS, COLUMNS
    )
    key = load_seed(seed, seed_low, seed_high) if DROPOUT else 0
    gate_bias, value_bias = _load_bias(up_bias, expert, column, d_ff, GATED)
    gate_total = tl.zeros((STEP, COLUMNS), tl.float32)
    value_total = gate_total
    for step in range(first, last, STEP):
        row = step + tl.arange(0, STEP)
        slot = (row + to_slot).to(tl.int64)[:, None]
        exists = (row < end)[:, None] & (column < d_ff)[None, :]
        inside = (row < last)[:, None] & (column < d_ff)[None, :]
        if BITS > 0:
            gate, value = load_pre(
                product, row + to_slot, end + to_slot, column_tile * COLUMNS, d_ff, tables, num_kept, d_ff, GATED,
                BITS, FIRST, FIXED, LARGEST, STEP, COLUMNS,
            )  # fmt: skip
        else:
            pointers = product + slot * num_up + column[None, :]
            gate, value = _load_pre(pointers, exists, gate_bias, value_bias, d_ff, GATED)
        grad = tl.load(grad_hidden + slot * d_ff + column[None, :], mask=exists, other=0.0).to(tl.float32)
        act, slope = activate_with_slope(gate, ACTIVATION)
        result = act * value if GATED else act
        if DROPOUT:
            kept = dropout_scale(row, column, key, threshold, scale)
            grad *= kept
        if routing_weights is not None:
            if partial_routing is not None:
                of_row = tl.sum(tl.where(exists, grad * result, 0.0), 1)
                tl.store(partial_routing + column_tile.to(tl.int64) * num_rows + row, of_row, mask=row < end)
            choice = load_choices(permutation, _existing(row, end), groups, num_rows)
            factor = tl.load(routing_weights + choice).to(tl.float32)[:, None]
            grad *= factor
            result *= factor
        if DROPOUT:
            result *= kept
        # A slot without a row takes no part in the gradients of the weights.
        if hidden is not None:
            tl.store(hidden + slot * d_ff + column[None, :], tl.where(exists, result, 0.0), mask=inside)
        grad_gate = tl.where(exists, (grad * value if GATED else grad) * slope, 0.0)
        grad_pointers = grad_pre + slot * num_up + column[None, :]
        tl.store(grad_pointers, grad_gate, mask=inside)
        if partial_up is not None:
            gate_total += grad_gate
        if GATED:
            grad_value = tl.where(exists, grad * act, 0.0)
            tl.store(grad_pointers + d_ff, grad_value, mask=inside)
            if partial_up is not None:
                value_total += grad_value
    if partial_up is not None:
        partial_up += block.to(tl.int64) * num_up + column
        stored = column < tl.where(first < end, d_ff, 0)
        tl.store(partial_up, tl.sum(gate_total, 0), mask=stored)
        if GATED:
            tl.store(partial_up + d_ff, tl.sum(value_total, 0), mask=stored)


@triton.jit(do_not_specialize=NUMBERS)
def scatter_kernel(
    product,  # [slots, D]
    bias,  # [E, D] or None
    permutation,  # int32 [R]
    groups,  # table of given groups, see groups.py, or None: equal groups
    routing_weights,  # [R], by choice, or None
    out,  # [R, D], by choice
    num_rows, num_experts, num_blocks, d_model, d_ff,
    ALIGNED: tl.constexpr,  # 8 divides D and F
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out[choice] = (product + bias) · routing weight.

    Grid: row blocks × ⌈D / COLUMNS⌉.
    """
    d_model, d_ff, _ = widths(d_model, d_ff, ALIGNED, False)
    _, expert, first, end, _, to_slot, _, column = _work(
        d_model, groups, num_rows, num_experts, num_blocks, ROWS, COLUMNS
    )
    own_bias, _ = _load_bias(bias, expert, column, d_model, False)
    for step in range(first, tl.minimum(first + ROWS, end), STEP):
        row = step + tl.arange(0, STEP)
        inside = (row < end)[:, None] & (column < d_model)[None, :]
        source = (row + to_slot).to(tl.int64)[:, None] * d_model + column[None, :]
        choice = load_choices(permutation, _existing(row, end), groups, num_rows)
        result = tl.load(product + source, mask=inside, other=0.0).to(tl.float32) + own_bias[None, :]
        if routing_weights is not None:
            result *= tl.load(routing_weights + choice).to(tl.float32)[:, None]
        tl.store(out + choice.to(tl.int64)[:, None] * d_model + column[None, :], result, mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def sums_kernel(
    partial_up,  # float32 [row blocks, F or 2F], or None without grad_up_bias
    partial_down,  # float32 [row blocks, D], or None without grad_down_bias
    groups,  # table of given groups, see groups.py, or None: equal groups
    grad_up_bias,  # [E, F or 2F]
    grad_down_bias,  # [E, D]
    num_rows, num_experts, d_model, d_ff,
    GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of the biases from the sums over row blocks, see `bias_tile`.

    Grid: E × (⌈F or 2F / COLUMNS⌉ with grad_up_bias, plus ⌈D / COLUMNS⌉ with grad_down_bias).
    """
    num_up = d_ff * 2 if GATED else d_ff
    bias_tile(
        tl.program_id(0), partial_up, partial_down, grad_up_bias, grad_down_bias, groups, None, None, num_rows,
        num_experts, num_up, d_model, False, ROWS, COLUMNS,
    )  # fmt: skip
