"""`python -m benchmarks.hopper`: what the kernels of `csrc/hopper` should take on an H200, by counting cycles.

A tile takes the cycles of its product on the tensor cores, at the clock at which a large product was measured, and of
what is done with it after, a warp's instruction a cycle on each of four schedulers. Cooperative, one comes after the
other; pingpong, what one warpgroup has left to do runs beside the products of the other. A cluster of two
multiprocessors works on its tiles one by one, so that the last round may be half empty. Memory is the limit where its
traffic takes longer.

None of these kernels has run on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from benchmarks.cases import Case
from benchmarks.model import BF16, CASES, H200, LAUNCH, MULTIPROCESSORS, PASS, Device, entries

FLOPS_PER_CYCLE = 4096  # of a multiprocessor, dense, 16 bits
ROWS, STEP = 128, 64  # of a tile, and of what is summed over
# Instructions of a thread for each of its accumulators, counted in the SASS of tests/cuda_on_host/hopper_device.cu.
UP, UP_GATED, GRAD_PRE, GRAD_PRE_GATED, SCATTER, STORE = 14.7, 6.3, 24.8, 19.9, 4.2, 1.9
CLUSTERS = MULTIPROCESSORS // 2


@dataclass(frozen=True)
class Product:
    """`[E, M, K] · [E, K, N]`, in tiles of `columns`; `moved`: elements read and written beside A, B once each."""

    experts: int
    m: int
    n: int
    k: int
    columns: int
    is_pingpong: bool
    instructions: float
    moved: int
    splits: int = 1  # of the sum over K

    @property
    def tiles(self) -> int:
        return self.experts * math.ceil(self.m / (2 * ROWS)) * math.ceil(self.n / self.columns)

    def cycles(self) -> float:
        """Of a cluster."""
        steps = math.ceil(math.ceil(self.k / STEP) / self.splits)
        of_product = steps * 2 * ROWS * self.columns * STEP / FLOPS_PER_CYCLE
        # ROWS · columns accumulators, 32 lanes, four schedulers.
        after = self.instructions * ROWS * self.columns / 128
        a_tile = max(of_product, (of_product + after) / 2) if self.is_pingpong else of_product + after
        return math.ceil(self.tiles * self.splits / CLUSTERS) * a_tile

    def seconds(self, device: Device) -> float:
        clock = device.matrix_rate / (MULTIPROCESSORS * FLOPS_PER_CYCLE)
        elements = self.experts * (self.m * self.k + self.k * self.n) + self.moved
        # Parts in float32, written and read.
        parts = 8 * self.splits * self.experts * self.m * self.n if self.splits > 1 else 0
        seconds = max(self.cycles() / clock, BF16 * elements / device.copy_rate)
        return seconds + (parts / device.copy_rate + LAUNCH if parts else 0)


def splits_of(gradient: Product) -> int:
    """As csrc/hopper does it."""
    steps = math.ceil(gradient.k / STEP)

    def cycles(splits: int) -> int:
        of_tile = 1024 * math.ceil(steps / splits) + (400 if splits == 1 else 1500)
        of_parts = 0 if splits == 1 else splits * gradient.experts * gradient.m * gradient.n * 27 // 10000
        return math.ceil(gradient.tiles * splits / CLUSTERS) * of_tile + of_parts

    return min(range(1, min(8, steps) + 1), key=cycles)


def products(s: Case) -> dict[str, list[Product]]:
    """Of the forward, which finds its rows by itself, and of the backward, after a pass that groups them."""
    e, t, d, f, up = s.num_experts, math.ceil(s.num_rows / s.num_experts), s.d_model, s.d_ff, s.num_up
    gated, rows = s.gated, s.num_experts * t
    columns, of_up, of_pre = (128, UP_GATED, GRAD_PRE_GATED) if gated else (192, UP, GRAD_PRE)
    return {
        "forward": [
            Product(e, t, up, d, columns, True, of_up, rows * (up + f)),
            Product(e, t, d, f, 256, False, SCATTER, rows * d),
        ],
        "backward": [
            Product(e, t, f, d, 128, True, of_pre, rows * (2 * up + f)),
            *(
                replace(gradient, splits=splits_of(gradient))
                for gradient in (
                    Product(e, d, f, t, 256, False, STORE, e * d * f),
                    Product(e, up, d, t, 256, False, STORE, e * d * up),
                )
            ),
            Product(e, t, d, up, 256, False, SCATTER, rows * d),
        ],
    }


def passes(s: Case) -> dict[str, float]:
    """Elements that passes over rows move: x and grad_y, grouped for the gradients of the weights."""
    return {"forward": 0, "backward": 4 * s.num_rows * s.d_model}


def predicted(s: Case, device: Device = H200) -> dict[str, float]:
    """Seconds by phase."""
    moved = passes(s)
    return {
        phase: sum(p.seconds(device) + LAUNCH for p in all_of_them) + PASS * BF16 * moved[phase] / device.copy_rate
        for phase, all_of_them in products(s).items()
    }


def main() -> None:
    columns = ("up", "down", "grad_pre", "grad W_down", "grad W_up", "grad_x", "forward", "backward")
    title = "µs on an H200, bfloat16, predicted"
    table = Table("shape", *columns, "both, of the best other form", "of the peak", title=title)
    others = {entry.name: min(entry.forward.values()) + min(entry.backward.values()) for entry in entries()}
    for case in (case for case in CASES if case.name in others):
        times = predicted(case)
        all_of_them = [p for phase in products(case).values() for p in phase]
        least = sum(case.operations(phase) for phase in ("forward", "backward")) / H200.matrix_rate
        ours = times["forward"] + times["backward"]
        table.add_row(
            case.name, *(f"{1e6 * p.seconds(H200):.0f}" for p in all_of_them),
            *(f"{1e6 * times[phase]:.0f}" for phase in ("forward", "backward")),
            f"{1e6 * ours / others[case.name]:.2f}", f"{least / ours:.2f}",
        )  # fmt: skip
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
