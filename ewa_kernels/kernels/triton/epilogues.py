"""What is done with an accumulated tile.

A tile is taken part by part (`PARTS`, by columns): whole, what is computed from it takes too many registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, activate_with_slope, dropout_scale
from .codec import load_encoded, saturated, store_encoded
from .tiles import halves, halves_of_row, pairs


@triton.jit
def store_up(
    acc, bias, row, end, first_column, pre_activation, hidden, tables, num_kept, seed, threshold, scale, d_ff,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr,
    FIXED: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """pre_activation and hidden, those that are not None, of `acc` `[BLOCK_M, WIDTH]` + `bias` `[WIDTH]`, by parts.

    pre_activation is encoded if BITS are not 0, see `codec.py`.
    Gated: even columns are gates, odd ones values, so that both of a hidden column are in one thread.
    """
    if PARTS > 1:
        left, right = halves(acc, BLOCK_M, WIDTH)
        left_bias, right_bias = halves_of_row(bias, WIDTH)
        step: tl.constexpr = WIDTH // 4 if GATED else WIDTH // 2
        store_up(
            left, left_bias, row, end, first_column, pre_activation, hidden, tables, num_kept, seed, threshold, scale,
            d_ff, ACTIVATION, GATED, DROPOUT, BITS, FIRST, FIXED, BLOCK_M, WIDTH // 2, PARTS // 2,
        )  # fmt: skip
        store_up(
            right, right_bias, row, end, first_column + step, pre_activation, hidden, tables, num_kept, seed,
            threshold, scale, d_ff, ACTIVATION, GATED, DROPOUT, BITS, FIRST, FIXED, BLOCK_M, WIDTH // 2, PARTS // 2,
        )  # fmt: skip
    else:
        columns: tl.constexpr = WIDTH // 2 if GATED else WIDTH
        column = first_column + tl.arange(0, columns)
        inside = (row < end)[:, None] & (column < d_ff)[None, :]
        acc += bias[None, :]
        if GATED:
            gate, value = pairs(acc, BLOCK_M, WIDTH)
            if pre_activation is not None:
                _store_pre(
                    pre_activation, gate, row, end, first_column, tables, num_kept, d_ff, 0, GATED, BITS, FIRST, FIXED,
                    BLOCK_M, columns,
                )  # fmt: skip
                _store_pre(
                    pre_activation, value, row, end, first_column, tables, num_kept, d_ff, 1, GATED, BITS, FIRST,
                    FIXED, BLOCK_M, columns,
                )  # fmt: skip
            result = activate(gate, ACTIVATION) * value
        else:
            if pre_activation is not None:
                _store_pre(
                    pre_activation, acc, row, end, first_column, tables, num_kept, d_ff, 0, GATED, BITS, FIRST, FIXED,
                    BLOCK_M, columns,
                )  # fmt: skip
            result = activate(acc, ACTIVATION)
        if DROPOUT:
            result *= dropout_scale(row, column, seed, threshold, scale)
        if hidden is not None:
            tl.store(hidden + row.to(tl.int64)[:, None] * d_ff + column[None, :], result, mask=inside)


@triton.jit
def _store_pre(
    pre_activation, tile, row, end, first_column, tables, num_kept, d_ff, PART: tl.constexpr, GATED: tl.constexpr,
    BITS: tl.constexpr, FIRST: tl.constexpr, FIXED: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """WIDTH columns of a part of pre_activation, gated 0 is the gate and 1 the value: as they are if BITS are 0."""
    if BITS > 0:
        store_encoded(
            pre_activation, tile, row, row < end, first_column, tables, num_kept, d_ff, PART, GATED, BITS, FIRST,
            FIXED, BLOCK_M, WIDTH,
        )  # fmt: skip
    else:
        num_up = d_ff * 2 if GATED else d_ff
        column = first_column + tl.arange(0, WIDTH)
        inside = (row < end)[:, None] & (column < d_ff)[None, :]
        index = row.to(tl.int64)[:, None] * num_up + column[None, :]
        tl.store(pre_activation + index + PART * d_ff, tile, mask=inside)


@triton.jit
def load_pre(
    pre_activation, row, end, first_column, stop, tables, num_kept, d_ff, GATED: tl.constexpr, BITS: tl.constexpr,
    FIRST: tl.constexpr, FIXED: tl.constexpr, LARGEST: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """pre_activation of `WIDTH` columns of hidden, those before `stop`, as it is stored; gated: gate and value."""
    num_up = d_ff * 2 if GATED else d_ff
    if BITS > 0:
        exists = row < end
        gate = load_encoded(
            pre_activation, row, exists, first_column, tables, num_kept, d_ff, 0, GATED, BITS, FIRST, FIXED, BLOCK_M,
            WIDTH,
        )  # fmt: skip
        gate = saturated(gate, LARGEST)
        value = gate
        if GATED:
            value = load_encoded(
                pre_activation, row, exists, first_column, tables, num_kept, d_ff, 1, GATED, BITS, FIRST, FIXED,
                BLOCK_M, WIDTH,
            )  # fmt: skip
            value = saturated(value, LARGEST)
    else:
        column = first_column + tl.arange(0, WIDTH)
        inside = (row < end)[:, None] & (column < stop)[None, :]
        index = row.to(tl.int64)[:, None] * num_up + column[None, :]
        gate = tl.load(pre_activation + index, mask=inside, other=0.0)
        value = tl.load(pre_activation + index + d_ff, mask=inside, other=0.0) if GATED else gate
    return gate, value


@triton.jit
def store_grad_pre(
    acc, gate, value, row, end, block, first_column, stop, pre_activation, grad_pre, hidden, partial_up, factor,
    grad_factor, tables, num_kept, seed, threshold, scale, d_ff,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr,
    FIXED: tl.constexpr, LARGEST: tl.constexpr, AHEAD: tl.constexpr, IS_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """From `acc`, grad_y @ down_weight: grad_pre, hidden once more, and grad_pre summed over the block's rows.

    `gate` and `value`: pre_activation of the first part, by `load_pre`, if AHEAD. Then each part loads those of the
    next, so that nobody waits for memory; returned are those of the columns after these, up to `stop`. Else, where
    another program has work meanwhile and registers are few, each part loads its own.
    `factor` is the rows' routing weight, or None: grad_pre and hidden are multiplied by it. `grad_factor`, pointers
    `[BLOCK_M]` or None, is where these columns' part of its gradient goes: the first part, and those that are added.
    """
    if PARTS > 1:
        left, right = halves(acc, BLOCK_M, WIDTH)
        gate, value = store_grad_pre(
            left, gate, value, row, end, block, first_column, stop, pre_activation, grad_pre, hidden, partial_up,
            factor, grad_factor, tables, num_kept, seed, threshold, scale, d_ff, ACTIVATION, GATED, DROPOUT, BITS,
            FIRST, FIXED, LARGEST, AHEAD, IS_FIRST, BLOCK_M, WIDTH // 2, PARTS // 2,
        )  # fmt: skip
        return store_grad_pre(
            right, gate, value, row, end, block, first_column + WIDTH // 2, stop, pre_activation, grad_pre, hidden,
            partial_up, factor, grad_factor, tables, num_kept, seed, threshold, scale, d_ff, ACTIVATION, GATED,
            DROPOUT, BITS, FIRST, FIXED, LARGEST, AHEAD, False, BLOCK_M, WIDTH // 2, PARTS // 2,
        )  # fmt: skip
    else:
        wanted = first_column + WIDTH if AHEAD else first_column
        next_gate, next_value = load_pre(
            pre_activation, row, end, wanted, stop, tables, num_kept, d_ff, GATED, BITS, FIRST, FIXED, LARGEST,
            BLOCK_M, WIDTH,
        )  # fmt: skip
        if not AHEAD:
            gate, value = next_gate, next_value
        column = first_column + tl.arange(0, WIDTH)
        num_up = d_ff * 2 if GATED else d_ff
        exists = column < d_ff
        inside = (row < end)[:, None] & exists[None, :]
        pre_row = row.to(tl.int64)[:, None] * num_up + column[None, :]
        partial_row = block.to(tl.int64) * num_up + column
        hidden_row = row.to(tl.int64)[:, None] * d_ff + column[None, :]
        act, slope = activate_with_slope(gate.to(tl.float32), ACTIVATION)
        if DROPOUT:
            kept = dropout_scale(row, column, seed, threshold, scale)
            acc *= kept
        if GATED:
            value = value.to(tl.float32)
        if factor is not None:
            if grad_factor is not None:
                product = acc * act * value if GATED else acc * act
                total = tl.sum(tl.where(inside, product, 0.0), 1)
                # One thread adds up a row's parts, one after the other.
                if IS_FIRST:
                    tl.store(grad_factor, total, mask=row < end)
                else:
                    tl.atomic_add(grad_factor, total, mask=row < end, sem="relaxed")
            acc *= factor[:, None]
        if GATED:
            _store_and_sum(acc * act, pre_row + d_ff, inside, grad_pre, partial_row + d_ff, exists, partial_up)
            acc *= value
            act *= value
        if DROPOUT:
            act *= kept
        if factor is not None:
            act *= factor[:, None]
        # First what sets most registers free.
        if GATED:
            _store_and_sum(acc * slope, pre_row, inside, grad_pre, partial_row, exists, partial_up)
            tl.store(hidden + hidden_row, act, mask=inside)
        else:
            tl.store(hidden + hidden_row, act, mask=inside)
            _store_and_sum(acc * slope, pre_row, inside, grad_pre, partial_row, exists, partial_up)
        return next_gate, next_value


@triton.jit
def _store_and_sum(tile, index, inside, out, total_index, exists, total):
    """out = tile; total = its sum over rows, unless None."""
    tl.store(out + index, tile, mask=inside)
    if total is not None:
        tl.store(total + total_index, tl.sum(tl.where(inside, tile, 0.0), 0), mask=exists)


@triton.jit
def store_rows(
    acc, bias, row, end, target, first_column, factor, out, num_columns,
    BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out[target] = (acc + bias) · factor, either if not None, for rows before `end`, by parts."""
    if PARTS > 1:
        left, right = halves(acc, BLOCK_M, WIDTH)
        left_bias, right_bias = None, None
        if bias is not None:
            left_bias, right_bias = halves_of_row(bias, WIDTH)
        half: tl.constexpr = WIDTH // 2
        store_rows(
            left, left_bias, row, end, target, first_column, factor, out, num_columns, BLOCK_M, half, PARTS // 2
        )  # fmt: skip
        store_rows(
            right, right_bias, row, end, target, first_column + half, factor, out, num_columns, BLOCK_M, half,
            PARTS // 2,
        )  # fmt: skip
    else:
        if bias is not None:
            acc += bias[None, :]
        if factor is not None:
            acc *= factor[:, None]
        column = first_column + tl.arange(0, WIDTH)
        inside = (row < end)[:, None] & (column < num_columns)[None, :]
        tl.store(out + target.to(tl.int64)[:, None] * num_columns + column[None, :], acc, mask=inside)
