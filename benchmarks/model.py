"""`python -m benchmarks.model`: what each form of the layer should take on an H200, and how far this model was right.

The floor is the larger of arithmetic and memory traffic at measured rates. Of a Triton kernel the prediction adds what
a tile costs besides its product: registers hold one tile per multiprocessor, so nothing overlaps with its epilogue. It
is calibrated by one factor for each kind of kernel. A library's product takes the larger of arithmetic and traffic at
rates fitted to what was measured; a pass over rows, its bytes at 1/1.15 of a copy's rate.

Everything is held against `results/tiles-nvidia-h100-h200.json`: kernels alone, by CUDA events.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import GPU_CASES, PHASES, Case
from ewa_kernels.kernels.forms import TABLE, Entry
from ewa_kernels.kernels.triton.configs import BACKWARD_PHASES, FORWARD_PHASES, Tile, choose, choose_onchip, table

RESULTS = Path(__file__).parent / "results"
MULTIPROCESSORS = 132
CLOCK = 1.755e9  # Hz, under load
LANES = 128  # instructions a multiprocessor issues per cycle, times 32 lanes

# Counted in the SASS for sm_90, per element of a tile: instructions of the epilogue.
EPILOGUE = {"pre_activation and GELU": 25, "store": 8, "grad_pre and hidden": 45}
# Estimated, per tile, in seconds: ticket 0.5, filling the pipeline 0.8, waiting and permutation 0.4 µs.
OVERHEAD = 1.7e-6
LAUNCH = 3e-6  # from the end of a kernel to the work of the next
PASS = 1.15  # what a pass over rows may take, of a copy of as many bytes
BF16 = 2  # bytes
CASES = tuple(replace(case, dtype=torch.bfloat16) for case in GPU_CASES if case.top_k is None)


@dataclass(frozen=True)
class Device:
    """`matrix_rate` (FLOP/s) and `copy_rate` (bytes/s, read and written ones counted) of large problems.

    A library's product takes the larger of its arithmetic and its traffic at `product_rate` and `product_bytes`, and
    `PRODUCT_START` on top: fitted to 18 products of three shapes on an H100, to 7 % on the average.
    """

    name: str
    copy_rate: float
    product_bytes: float
    matrix_rate: float = 790e12
    product_rate: float = 720e12


PRODUCT_START = 10e-6
# The rates of memory of the one were measured on it; the other's are 1.4 times as slow, as their data sheets say.
H200 = Device("NVIDIA H200", 4.3e12, 3.9e12)
H100 = Device("NVIDIA H100", 4.3e12 / 1.4, 3.9e12 / 1.4)


def moved_bytes(case: Case, phase: str) -> float:
    """What the Triton forms read and write: in backward grad_pre and hidden too, written once and read again."""
    pre, hidden = BF16 * case.num_rows * case.num_up, BF16 * case.num_rows * case.d_ff
    return case.least_bytes(phase) + (3 * pre + 2 * hidden if phase == "backward" else 0)


def floor(case: Case, phase: str, device: Device = H200) -> float:
    """Seconds below which no implementation gets."""
    return max(case.operations(phase) / device.matrix_rate, case.least_bytes(phase) / device.copy_rate)


# --- Triton's forms ---


def _tiles(rows: int, columns: int, depth: float, tile: Tile, epilogue: float, device: Device) -> tuple[int, float]:
    """How many tiles a product has, and what one takes."""
    count = math.ceil(rows / tile.block_m) * math.ceil(columns / tile.block_n)
    cells = tile.block_m * tile.block_n
    product = 2 * cells * depth / (device.matrix_rate / MULTIPROCESSORS)
    return count, product + cells * epilogue / (LANES * CLOCK) + OVERHEAD


def _queue(*kinds: tuple[int, float]) -> float:
    """All tiles in one queue: the work shared evenly, then half a tile of the last kind while others idle."""
    return sum(count * seconds for count, seconds in kinds) / MULTIPROCESSORS + kinds[-1][1] / 2


def _triton(s: Case, device: Device) -> Iterator[tuple[str, float]]:
    """(form, seconds), before calibration."""
    tiles, widths = table(90, torch.bfloat16, "ieee"), (s.d_ff, s.d_model)
    traffic = [moved_bytes(s, phase) / device.copy_rate for phase in PHASES[:2]]
    up_cost = EPILOGUE["pre_activation and GELU"] * (0.6 if s.gated else 1)

    def chosen(kernel: str) -> Tile:
        columns = {"forward up": (s.num_up,), "forward down": (s.d_model,)}.get(kernel, widths)
        return choose(tiles[kernel], s.num_tokens, s.num_experts, columns)

    def halves(up: str, down: str) -> tuple[tuple[int, float], tuple[int, float]]:
        return (
            _tiles(s.num_tokens, s.num_up, s.d_model, chosen(up), up_cost, device),
            _tiles(s.num_tokens, s.d_model, s.d_ff, chosen(down), EPILOGUE["store"], device),
        )

    hidden = BF16 * s.num_tokens * s.d_ff
    yield "forward, single", max(_queue(*halves("forward", "forward")), traffic[0] + hidden / device.copy_rate)
    # Hidden is read from memory again.
    least = (traffic[0] + 2 * hidden / device.copy_rate) / 2
    yield "forward, split", LAUNCH + sum(max(_queue(kind), least) for kind in halves(*FORWARD_PHASES))
    onchip = choose_onchip(tiles["onchip"], s.d_model)
    if onchip is not None:
        epilogue = EPILOGUE["store"] + up_cost * s.d_ff / onchip.block_k
        shape = Tile(128, onchip.block_k, 16, 1, 8, 1)
        yield (
            "forward, on chip",
            max(_queue(_tiles(s.num_tokens, onchip.block_k, 2 * s.d_ff, shape, epilogue, device)), traffic[0]),
        )

    def phases(*kernels: str) -> list[list[tuple[int, float]]]:
        """Tiles of grad_pre, of the weights' gradients, and of grad_x."""
        pre, weight, x = map(chosen, kernels)
        depth = s.num_tokens / s.num_experts
        weights = [
            _tiles(m, n, depth, weight, EPILOGUE["store"], device)
            for m, n in ((s.d_model, s.d_ff), (s.num_up, s.d_model))
        ]
        return [
            [_tiles(s.num_tokens, s.d_ff, s.d_model, pre, EPILOGUE["grad_pre and hidden"], device)],
            [(s.num_experts * count, seconds) for count, seconds in weights],
            [_tiles(s.num_tokens, s.d_model, s.num_up, x, EPILOGUE["store"], device)],
        ]

    yield "backward, single", max(_queue(*itertools.chain(*phases(*["backward"] * 3))), traffic[1])
    yield "backward, split", max(2 * LAUNCH + sum(_queue(*kinds) for kinds in phases(*BACKWARD_PHASES)), traffic[1])


# --- by a library's products ---


def product_seconds(rows: int, depth: int, columns: int, weights: int, device: Device) -> float:
    """Of a library's product of `rows` × `depth` and `weights` elements; the bytes are the same for all three kinds."""
    size = BF16 * (rows * (depth + columns) + weights)
    return max(2.0 * rows * depth * columns / device.product_rate, size / device.product_bytes) + PRODUCT_START


def _passes(s: Case) -> dict[str, list[float]]:
    """Bytes that each pass over rows reads and writes."""
    x, hidden, up = (BF16 * s.num_rows * width for width in (s.d_model, s.d_ff, s.num_up))
    return {
        "forward": [2 * x, up + hidden, 2 * x],  # gather; activate; scatter
        "backward": [4 * x, 2 * hidden + 2 * up, 2 * x],  # gather x and grad_y; activate, backward; scatter
    }


def _cublas(s: Case, device: Device) -> Iterator[tuple[str, float]]:
    up = product_seconds(s.num_rows, s.d_model, s.num_up, s.num_experts * s.d_model * s.num_up, device)
    down = product_seconds(s.num_rows, s.d_ff, s.d_model, s.num_experts * s.d_model * s.d_ff, device)
    for phase, times in (("forward", 1), ("backward", 2)):
        passes = sum(PASS * size / device.copy_rate + LAUNCH for size in _passes(s)[phase])
        yield f"{phase}, cublas", times * (up + down) + passes


# --- held against what was measured ---


@dataclass(frozen=True)
class Measured:
    """Seconds of a form's kernels alone, or of whole products."""

    case: str
    form: str
    device: Device
    seconds: float


@functools.cache
def measured() -> tuple[Measured, ...]:
    """What the Triton forms that ship took, tiles as they ship."""
    found = json.loads((RESULTS / "tiles-nvidia-h100-h200.json").read_text())
    by_phase = found["tiles by phase, between 97a86636d15d and 8ef96f1e10f7, without rows in order"]
    h200 = found["tiles on an NVIDIA H200, 8ef96f1e10f7"]
    small, large = "128x128x64 p4 w4 s3 c2", "128x256x64 p4 w8 s3 c1"

    def forward(case: str, tile: str, up: str, down: str) -> Iterator[Measured]:
        of_case = {" ".join(name.split()): value for name, value in by_phase[case].items()}
        yield Measured(case, "forward, single", H100, 1e-3 * of_case[f"forward single {tile}"])
        halves = of_case[f"forward up {up}"] + of_case[f"forward down {down}"]
        yield Measured(case, "forward, split", H100, 1e-3 * halves)

    return (
        *forward("ViT-S", small, large, small),
        *forward("ViT-B", large, large, large),
        Measured("Swin stage 1", "forward, on chip", H200, 1e-3 * h200["Swin stage 1, onchip"]["0"]),
        Measured("ViT-S", "backward, single", H200, 1e-3 * h200["ViT-S, backward"]["A"]),
        Measured("ViT-B", "backward, single", H200, 1e-3 * h200["ViT-B, backward"]["B"]),
    )


@functools.cache
def measured_products() -> tuple[Measured, ...]:
    """Products by cuBLAS of the same shapes, on an H100."""
    found = json.loads((RESULTS / "tiles-nvidia-h100-h200.json").read_text())["what is left out, 97a86636d15d"]
    return tuple(
        Measured(case, name, H100, 1e-3 * milliseconds)
        for case, times in found.items()
        for name, milliseconds in times.items()
        if name.startswith("cublas")
    )


def _kind(form: str) -> str:
    return "on chip" if form.endswith("on chip") else form.split(",")[0]


@functools.cache
def calibration() -> dict[str, float]:
    """By how much kernels of a kind take longer than their tiles say: the median of what was measured."""
    ratios: dict[str, list[float]] = {}
    for point in measured():
        ratios.setdefault(_kind(point.form), []).append(
            point.seconds / dict(_triton(case_named(point.case), point.device))[point.form]
        )
    return {kind: statistics.median(values) for kind, values in ratios.items()}


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def predictions(s: Case, device: Device = H200) -> Iterator[tuple[str, float]]:
    """(form, seconds) of what the package can launch."""
    for form, seconds in _triton(s, device):
        yield form, max(seconds * calibration()[_kind(form)], floor(s, form.split(",")[0], device))
    yield from _cublas(s, device)


def errors() -> Iterator[tuple[Measured, float]]:
    """Each measured point and what the model says of it."""
    for point in measured():
        yield point, dict(predictions(case_named(point.case), point.device))[point.form]
    for point in measured_products():
        s = case_named(point.case)
        yield point, product_seconds(s.num_rows, s.d_model, s.d_ff, s.num_experts * s.d_model * s.d_ff, point.device)


@functools.cache
def measured_splits() -> dict[str, float]:
    """Of each shape, how long the backward in three launches takes, of that in one; on an H200, the host included."""
    rows = json.loads((RESULTS / "nvidia-h200.json").read_text())["layer"]
    times = {(r["case"], r["peer"]): r["backward"]["median"] for r in rows if "backward" in r}
    names = {case for case, peer in times if peer == "ewa_kernels, split form"}
    return {n: times[n, "ewa_kernels, split form"] / times[n, "ewa_kernels, one launch"] for n in names}


def entries() -> list[Entry]:
    """For `ewa_kernels/kernels/forms.json`: predictions for an H200, put right by what was measured of a form."""
    corrections = {(p.case, p.form): p.seconds / seconds for p, seconds in errors() if not p.form.startswith("cublas")}
    found = []
    for case in (case for case in CASES if case.bias):  # which makes no difference to the model
        times: dict[str, dict[str, float]] = {phase: {} for phase in PHASES[:2]}
        for form, seconds in predictions(case):
            phase, name = form.split(", ")
            corrected = seconds * corrections.get((case.name, form), 1.0)
            times[phase][name.replace(" ", "")] = round(1e6 * corrected, 1)
        if case.name in measured_splits():
            times["backward"]["split"] = round(times["backward"]["single"] * measured_splits()[case.name], 1)
        found.append(
            Entry(
                name=case.name,
                capability=9,
                itemsize=BF16,
                gated=case.gated,
                num_rows=case.num_rows,
                num_experts=case.num_experts,
                d_model=case.d_model,
                d_ff=case.d_ff,
                measured=False,
                source=f"predicted for an {H200.name} by benchmarks/model.py; cublas was never measured",
                **times,
            )
        )
    return found


def write(path: Path, found: Sequence[Entry], environment: dict[str, Any] | None = None) -> None:
    """As `ewa_kernels.kernels.forms` reads it."""
    table = {"environment": environment, "entries": [asdict(entry) for entry in found]}
    path.write_text(json.dumps(table, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__)
    parser.add_argument("--write", action="store_true", help="the table of forms that ships")
    if parser.parse_args().write:
        write(TABLE, entries())
    console = Console(width=110)
    result = Table("shape", "form", "TFLOP", "floor µs", "predicted µs", "TFLOP/s", "of floor", title=H200.name)
    for case in CASES:
        found = dict(predictions(case))
        for phase in PHASES[:2]:
            forms = {form: seconds for form, seconds in found.items() if form.startswith(phase)}
            flop, least = case.operations(phase), floor(case, phase)
            for form, seconds in forms.items():
                best = " *" if seconds == min(forms.values()) else ""
                result.add_row(
                    case.name,
                    form + best,
                    f"{flop / 1e12:.2f}",
                    f"{least * 1e6:.0f}",
                    f"{seconds * 1e6:.0f}",
                    f"{flop / seconds / 1e12:.0f}",
                    f"{least / seconds:.0%}",
                )
    console.print(result)
    check = Table(
        "shape", "what", "device", "measured µs", "model µs", "error", title="The model against what was measured"
    )
    misses = []
    for point, seconds in errors():
        misses.append(abs(seconds / point.seconds - 1))
        check.add_row(
            *(point.case, point.form, point.device.name, f"{point.seconds * 1e6:.0f}", f"{seconds * 1e6:.0f}"),
            f"{seconds / point.seconds - 1:+.0%}",
        )
    console.print(check)
    factors = ", ".join(f"{kind} {factor:.2f}" for kind, factor in calibration().items())
    console.print(f"mean error {statistics.fmean(misses):.1%} of {len(misses)}; factors of calibration: {factors}")


if __name__ == "__main__":
    main()
