"""What the tiles of the forward and the backward share: who works on which rows, and matrix products."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Numbers that kernels are not specialised on: all but D and F, which say how well rows are aligned.
NUMBERS = [
    *(
        "num_rows",
        "num_kept",
        "num_experts",
        "num_blocks",
        "num_counters",
        "num_splits",
        "group",
        "radix_a",
        "radix_b",
        "rounds",
    ),
    *("seed_low", "seed_high", "threshold", "scale"),
    *("end_pre", "end_group", "end_biases", "end_down", "end_up", "end_x"),
]

# --- experts and row blocks ---


@triton.jit
def rows_of_expert(expert, groups, num_rows, num_experts):
    """First grouped row of an expert, and the end of its rows."""
    if groups is not None:
        return tl.load(groups + expert), tl.load(groups + expert + 1)
    # ⌊e·T/E⌋ without 64-bit divisions, which cost more than all the rest here.
    quotient = num_rows // num_experts
    remainder = num_rows - quotient * num_experts
    start = expert * quotient + expert * remainder // num_experts
    end = (expert + 1) * quotient + (expert + 1) * remainder // num_experts
    return start, end


@triton.jit
def first_block_of_expert(expert, groups, num_rows, num_experts, BLOCK_M: tl.constexpr):
    if groups is not None:
        return tl.load(groups + num_experts + 1 + expert)
    return expert * tl.cdiv(tl.cdiv(num_rows, num_experts), BLOCK_M)


@triton.jit
def rows_of_block(block, groups, num_rows, num_experts, num_blocks, BLOCK_M: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a row block; a block without rows has first row ≥ end."""
    if groups is not None:
        expert = tl.load(groups + 2 * num_experts + 1 + tl.minimum(block, num_blocks - 1))
    else:
        expert = block // tl.cdiv(tl.cdiv(num_rows, num_experts), BLOCK_M)
    start, end = rows_of_expert(expert, groups, num_rows, num_experts)
    before = first_block_of_expert(expert, groups, num_rows, num_experts, BLOCK_M)
    return expert, start + (block - before) * BLOCK_M, end


@triton.jit
def load_choices(permutation, row, groups, num_rows):
    """permutation[row]. One that was given may hold anything: no address made of it leaves the tensors."""
    choice = tl.load(permutation + row)
    if groups is not None:
        tl.device_assert((choice >= 0) & (choice < num_rows), "permutation must hold 0 to R - 1")
        choice = tl.minimum(tl.maximum(choice, 0), num_rows - 1)
    return choice


@triton.jit
def block_of_tile(tile, tiles, num_blocks, group=None):
    """(row block, column tile), where each block has `tiles`: first all of some blocks, which are read once then.

    `group`: of how many blocks; None: as many as keep all programs busy.
    """
    if group is None:
        group = tl.cdiv(tl.num_programs(0), tiles)
    first = tile // (group * tiles) * group
    group = tl.minimum(group, num_blocks - first)
    rest = tile - first * tiles
    column_tile = rest // group
    return first + rest - column_tile * group, column_tile


# --- matrix products ---


@triton.jit
def widths(d_model, d_ff, ALIGNED: tl.constexpr, GATED: tl.constexpr):
    """D, F and the columns of pre_activation."""
    if ALIGNED:
        # In a form that shows the compiler that 8 divides them, and so which rows begin at 16 bytes.
        d_model, d_ff = d_model // 8 * 8, d_ff // 8 * 8
    return d_model, d_ff, d_ff * 2 if GATED else d_ff


@triton.jit
def clamp_columns(column, size, ALIGNED: tl.constexpr):
    """Columns ≥ size are replaced by some that exist; nobody uses what is computed from them."""
    if ALIGNED:
        # Runs of eight stay together, so that one instruction loads them.
        return tl.max_contiguous(tl.multiple_of(tl.where(column < size, column, column % 8), 8), 8)
    return tl.minimum(column, size - 1)


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b."""
    if INTERPRETED:
        # The interpreter would multiply the bit patterns of bfloat16.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def multiply_rows(
    a, b, a_row, n, expert, end_k, size_k, size_n,
    TRANSPOSED: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Columns `n` of a[a_row] @ b[expert], or of a[a_row] @ b[expert]ᵀ: float32 `[BLOCK_M, BLOCK_N]`.

    `end_k`: `size_k`, or 0 for no product, which is zero.
    """
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a + a_row.to(tl.int64)[:, None] * size_k + k[None, :]
    if TRANSPOSED:
        b_ptrs = b + (expert.to(tl.int64) * size_n + n)[:, None] * size_k + k[None, :]
    else:
        b_ptrs = b + (expert.to(tl.int64) * size_k + k)[:, None] * size_n + n[None, :]
    acc = tl.zeros((a_row.shape[0], n.shape[0]), tl.float32)
    for first_k in range(0, end_k, BLOCK_K):
        if EVEN_K:
            a_tile = tl.load(a_ptrs)
            b_tile = tl.load(b_ptrs)
        else:
            inside = k < size_k - first_k
            a_tile = tl.load(a_ptrs, mask=inside[None, :], other=0.0)
            b_tile = tl.load(b_ptrs, mask=inside[None, :] if TRANSPOSED else inside[:, None], other=0.0)
        acc = multiply(a_tile, b_tile.T if TRANSPOSED else b_tile, acc, PRECISION)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K if TRANSPOSED else BLOCK_K * size_n
    return acc


@triton.jit
def halves(tile, M: tl.constexpr, N: tl.constexpr):
    """Left and right half of a tile `[M, N]`; no data moves between threads."""
    return tl.split(tl.permute(tl.reshape(tile, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def halves_of_row(row, N: tl.constexpr):
    """Left and right half of a row `[N]`."""
    return tl.split(tl.permute(tl.reshape(row, (2, N // 2)), (1, 0)))


@triton.jit
def pairs(tile, M: tl.constexpr, N: tl.constexpr):
    """Even and odd columns of a tile `[M, N]`; no data moves between threads."""
    return tl.split(tl.reshape(tile, (M, N // 2, 2)))
