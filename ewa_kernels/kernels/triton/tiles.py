"""What the tiles of the forward and the backward share: who works on what, who waits for whom, matrix products.

Work is queued. A tile's number is its ticket; a running program draws the next ticket from a counter, so tickets
are handed out in order, and a tile may wait for tiles with lower tickets: those are done, or held by programs
that are running. That makes progress certain with any number of programs, one after the other included.

`counters` (int32, zero before and after each launch): [0] the next ticket, [1] programs that have finished,
[2…] tiles done, by row block (forward) or by expert (backward), then splits done, by tile (backward).
"""

from __future__ import annotations

import triton
import triton.language as tl

FIRST_COUNTER = tl.constexpr(2)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Seconds of waiting. The interpreter runs one program after the other: a wait that is not over at once never is.
MAX_SPINS = tl.constexpr(1 if triton.knobs.runtime.interpret else 2**22)

# --- the queue ---


@triton.jit
def draw_ticket(counters):
    return tl.atomic_add(counters, 1, sem="relaxed")


@triton.jit
def wait_until(counter, count):
    """Returns when the counter has reached `count`; what was written before its `signal`s can be read then."""
    done = tl.atomic_add(counter, 0, sem="acquire")
    spins = 0
    while done < count:
        spins += 1
        # Heeded by the interpreter, and on a GPU in debug mode.
        assert spins < MAX_SPINS, "what is waited for is never done"
        done = tl.atomic_add(counter, 0, sem="acquire")


@triton.jit
def signal(counter):
    """Adds one to a counter, after everything that this program has written; returns the count before."""
    # Triton puts no barrier before the atomic, which one thread executes: without this it overtakes the others' stores.
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel")


@triton.jit
def leave_clean(counters, num_counters):
    """The last program out sets all counters to zero."""
    if signal(counters + 1) == tl.num_programs(0) - 1:
        for first in range(0, num_counters, 256):
            index = first + tl.arange(0, 256)
            tl.store(counters + index, 0, mask=index < num_counters)


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
def block_of_tile(tile, tiles, num_blocks):
    """(row block, column tile), where each block has `tiles`: first all of some blocks, which are read once then."""
    group = tl.cdiv(tl.num_programs(0), tiles)  # these keep all programs busy
    first = tile // (group * tiles) * group
    group = tl.minimum(group, num_blocks - first)
    rest = tile - first * tiles
    column_tile = rest // group
    return first + rest - column_tile * group, column_tile


@triton.jit
def wait_for_expert(expert, groups, num_rows, num_experts, num_blocks, end_sums, counters, BLOCK_M: tl.constexpr):
    """Returns when all tickets before `end_sums` that concern the expert's rows are done."""
    start, end = rows_of_expert(expert, groups, num_rows, num_experts)
    wait_until(counters + FIRST_COUNTER + expert, tl.cdiv(end - start, BLOCK_M) * (end_sums // num_blocks))


# --- matrix products ---


@triton.jit
def multiple_of_eight(size):
    """The same number, in a form that shows the compiler what it is, and so which rows begin at 16 bytes."""
    return size // 8 * 8


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
