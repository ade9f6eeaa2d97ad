"""The queue of tiles within a launch: tickets, and who waits for whom.

A tile's number is its ticket; a running program draws the next ticket from a counter, so tickets are handed out in
order, and a tile may wait for tiles with lower tickets: those are done, or held by programs that are running. That
makes progress certain with any number of programs, one after the other included; also if a program draws its next
ticket before it begins with the one it has (`Tile.early`), since of all that are not done the lowest is at work.

`counters` (int32, zero before and after each launch): [0] the next ticket, [1] programs that have finished,
[2…] tiles done, by row block (forward) or by expert (backward), then splits done, by tile (backward).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import INTERPRETED, rows_of_expert

FIRST_COUNTER = tl.constexpr(2)
# Seconds of waiting. The interpreter runs one program after the other: a wait that is not over at once never is.
MAX_SPINS = tl.constexpr(1 if triton.knobs.runtime.interpret else 2**22)


@triton.jit
def draw_ticket(counters):
    return tl.atomic_add(counters, 1, sem="relaxed")


@triton.jit
def wait_until(counter, count, BACKOFF: tl.constexpr):
    """Returns when the counter has reached `count`; what was written before its `signal`s can be read then.

    BACKOFF: some 100 ns pass before the counter is read again, which those that work on the same memory have in peace.
    """
    done = tl.atomic_add(counter, 0, sem="acquire")
    spins = 0
    while done < count:
        spins += 1
        # Heeded by the interpreter, and on a GPU in debug mode.
        assert spins < MAX_SPINS, "what is waited for is never done"
        if BACKOFF and not INTERPRETED:
            tl.inline_asm_elementwise(
                "nanosleep.u32 100; mov.u32 $0, $1;", "=r,r", [spins], dtype=tl.int32, is_pure=False, pack=1
            )
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


@triton.jit
def wait_for_expert(
    expert, groups, num_rows, num_experts, tiles_before, counters, BACKOFF: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Returns when of each row block of an expert `tiles_before` tiles are done, those that are first in the queue."""
    start, end = rows_of_expert(expert, groups, num_rows, num_experts)
    wait_until(counters + FIRST_COUNTER + expert, tl.cdiv(end - start, BLOCK_M) * tiles_before, BACKOFF)
