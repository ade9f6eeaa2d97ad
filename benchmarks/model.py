"""`python -m benchmarks.model`: what the Triton kernels should take on an H200, from first principles, before any run.

The floor is the larger of arithmetic and memory traffic at measured rates. The prediction adds what a tile costs
besides its product: registers hold one tile per multiprocessor, so nothing overlaps with its epilogue.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import GPU_CASES, PHASES, Case
from ewa_kernels.kernels.triton.configs import BACKWARD_PHASES, Tile, choose, choose_onchip, table

# Measured on one H200 with large problems: a bf16 matrix product and a device-to-device copy.
MATRIX_RATE = 790e12  # FLOP/s
COPY_RATE = 4.3e12  # bytes/s, read and written ones counted
MULTIPROCESSORS = 132
CLOCK = 1.755e9  # Hz, under load
LANES = 128  # instructions a multiprocessor issues per cycle, times 32 lanes

# Counted in the SASS for sm_90, per element of a tile: instructions of the epilogue.
EPILOGUE = {"pre_activation and GELU": 25, "store": 8, "grad_pre and hidden": 45}
# Estimated, per tile, in seconds: ticket 0.5, filling the pipeline 0.8, waiting and permutation 0.4 µs.
OVERHEAD = 1.7e-6
LAUNCH = 3e-6  # from the end of a kernel to the work of the next
BF16 = 2  # bytes
CASES = tuple(replace(case, dtype=torch.bfloat16) for case in GPU_CASES if case.top_k is None)


def moved_bytes(case: Case, phase: str) -> float:
    """What this package's launches read and write: in backward grad_pre and hidden too, written once and read again."""
    pre, hidden = BF16 * case.num_rows * case.num_up, BF16 * case.num_rows * case.d_ff
    return case.least_bytes(phase) + (3 * pre + 2 * hidden if phase == "backward" else 0)


def floor(case: Case, phase: str) -> float:
    """Seconds below which no implementation gets."""
    return max(case.operations(phase) / MATRIX_RATE, case.least_bytes(phase) / COPY_RATE)


def _tiles(rows: int, columns: int, depth: float, tile: Tile, epilogue: float) -> tuple[int, float]:
    """How many tiles a product has, and what one takes."""
    count = math.ceil(rows / tile.block_m) * math.ceil(columns / tile.block_n)
    cells = tile.block_m * tile.block_n
    product = 2 * cells * depth / (MATRIX_RATE / MULTIPROCESSORS)
    return count, product + cells * epilogue / (LANES * CLOCK) + OVERHEAD


def _queue(*kinds: tuple[int, float]) -> float:
    """All tiles in one queue: the work shared evenly, then half a tile of the last kind while others idle."""
    return sum(count * seconds for count, seconds in kinds) / MULTIPROCESSORS + kinds[-1][1] / 2


def predictions(s: Case) -> Iterator[tuple[str, float]]:
    """(form, seconds) of what the package can launch."""
    tiles = table(90, torch.bfloat16, "ieee")
    traffic = [moved_bytes(s, phase) / COPY_RATE for phase in PHASES[:2]]
    tile = choose(tiles["forward"], s.num_tokens, s.num_experts, (s.d_ff, s.d_model))
    up_cost = EPILOGUE["pre_activation and GELU"] * (0.6 if s.gated else 1)
    up = _tiles(s.num_tokens, s.num_up, s.d_model, tile, up_cost)
    down = _tiles(s.num_tokens, s.d_model, s.d_ff, tile, EPILOGUE["store"])
    hidden = BF16 * s.num_tokens * s.d_ff
    yield "forward, single", max(_queue(up, down), traffic[0] + hidden / COPY_RATE)
    # Hidden is read from memory again.
    yield (
        "forward, split",
        LAUNCH + sum(max(_queue(kind), (traffic[0] + 2 * hidden / COPY_RATE) / 2) for kind in (up, down)),
    )
    onchip = choose_onchip(tiles["onchip"], s.d_model)
    if onchip is not None:
        epilogue = EPILOGUE["store"] + up_cost * s.d_ff / onchip.block_k
        block = _tiles(s.num_tokens, onchip.block_k, 2 * s.d_ff, Tile(128, onchip.block_k, 16, 1, 8, 1), epilogue)
        yield "forward, on chip", max(_queue(block), traffic[0])

    def phases(*kernels: str) -> list[list[tuple[int, float]]]:
        """Tiles of grad_pre, of the weights' gradients, and of grad_x."""
        widths = (s.d_ff, s.d_model)
        pre, weight, x = (choose(tiles[kernel], s.num_tokens, s.num_experts, widths) for kernel in kernels)
        depth = s.num_tokens / s.num_experts
        weights = [
            _tiles(m, n, depth, weight, EPILOGUE["store"]) for m, n in ((s.d_model, s.d_ff), (s.num_up, s.d_model))
        ]
        return [
            [_tiles(s.num_tokens, s.d_ff, s.d_model, pre, EPILOGUE["grad_pre and hidden"])],
            [(s.num_experts * count, seconds) for count, seconds in weights],
            [_tiles(s.num_tokens, s.d_model, s.num_up, x, EPILOGUE["store"])],
        ]

    yield "backward, single", max(_queue(*itertools.chain(*phases(*["backward"] * 3))), traffic[1])
    yield "backward, split", max(2 * LAUNCH + sum(_queue(*kinds) for kinds in phases(*BACKWARD_PHASES)), traffic[1])


def main() -> None:
    console = Console(width=110)
    result = Table("shape", "what", "TFLOP", "GB", "floor µs", "predicted µs", "TFLOP/s", "of floor")
    for case in CASES:
        for form, seconds in predictions(case):
            phase = form.split(",")[0]
            flop, size, least = case.operations(phase), moved_bytes(case, phase), floor(case, phase)
            result.add_row(
                case.name,
                form,
                f"{flop / 1e12:.2f}",
                f"{size / 1e9:.2f}",
                f"{least * 1e6:.0f}",
                f"{seconds * 1e6:.0f}",
                f"{flop / seconds / 1e12:.0f}",
                f"{least / seconds:.0%}",
            )
    console.print(result)


if __name__ == "__main__":
    main()
