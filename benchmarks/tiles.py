"""`python -m benchmarks.tiles`: which tile each kernel likes best, on this GPU, for the shapes of `benchmarks.model`.

Every candidate is compiled first, in as many processes as there are cores; those that spill registers or do not fit
are dropped. The others are held against the results of the tile that ships, and take turns in one run. Writes
`tiles-<device>.json`; whoever believes it changes `ewa_kernels/kernels/triton/configs.py`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import model
from benchmarks.cases import Case
from benchmarks.environment import environment
from benchmarks.parity import differs
from benchmarks.timing import Stopwatch, interleaved, timed
from ewa_kernels.kernels.triton.backward import launch_backward
from ewa_kernels.kernels.triton.configs import CANDIDATES, FORWARD_PHASES, PHASES, Tile
from ewa_kernels.kernels.triton.forward import launch_forward
from ewa_kernels.kernels.triton.layer import Layer
from ewa_kernels.kernels.triton.onchip import launch_onchip
from ewa_kernels.kernels.triton.split import launch_down, launch_up
from ewa_kernels.problem import Deal, Inputs, Options, Problem

KERNELS = ("forward", "backward", *PHASES, "onchip")  # a phase: in the whole forward or backward, in several launches
ROUNDS = 15


def candidates(kernel: str) -> Iterator[Tile]:
    """Worth a try on Hopper; what ships is always among those that are timed."""
    yield from CANDIDATES.get(kernel, ())
    if kernel == "onchip":
        for m, n, parts, warps, stages in itertools.product((64, 128), (32, 64, 128), (1, 2), (4, 8), (2, 3)):
            yield Tile(m, n, 128, parts, warps, stages)
        return
    for (m, n), k, parts, stages in itertools.product(
        ((128, 256), (256, 128), (128, 128)), (32, 64), (2, 4, 8, 16), (3, 4)
    ):
        yield Tile(m, n, k, parts, 8, stages)
    for (m, n), k, parts, warps, stages in itertools.product(
        ((128, 128), (128, 64), (64, 128)), (32, 64), (2, 4), (4, 8), (2, 3)
    ):
        yield Tile(m, n, k, parts, warps, stages, per_multiprocessor=2)


class Operands:
    """The operands of a shape, and what a kernel makes of them with a given tile."""

    def __init__(self, shape: Case, device: str, dtype: torch.dtype, num_tokens: int | None = None):
        torch.manual_seed(0)
        self.shape = replace(shape, num_tokens=num_tokens or shape.num_tokens)
        e, d, f = shape.num_experts, shape.d_model, shape.d_ff
        t, up = self.shape.num_tokens, shape.num_up

        def random(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*size, device=device) * scale).to(dtype)

        self.x, self.grad_y = random(t, d), random(t, d)
        self.parameters = (random(e, up, d, scale=d**-0.5), random(e, up), random(e, d, f, scale=f**-0.5), random(e, d))
        self.permutation = torch.empty(t, dtype=torch.int32, device=device)
        self.y, self.grad_x = torch.empty_like(self.x), torch.empty_like(self.x)
        self.pre_activation, self.hidden = random(t, up), random(t, f)
        self.grads = [torch.empty_like(p) for p in self.parameters]
        self._inputs = Inputs(self.x, *self.parameters, None)

    def _layer(self, deal: Deal, backend: str = "triton", **kept: Any) -> Layer:
        gated = self.shape.gated
        options = Options("silu" if gated else "gelu", gated, 0.0, backend, "full")
        problem = replace(Problem.of(self._inputs, False, options, saved="full"), kept=kept)
        return Layer(problem, self._inputs, deal)

    def shipped(self, kernel: str) -> Tile | None:
        """What `configs` picks; None where there is none."""
        layer = self._layer(Deal(1))
        return layer.onchip_tile() if kernel == "onchip" else layer.tile(kernel)

    def run(self, kernel: str, tile: Tile) -> list[Tensor]:
        """Launches it, and returns what it wrote."""
        shipped = self._layer(Deal(1))
        table = {**{phase: (shipped.tile(phase),) for phase in PHASES}, kernel: (tile,)}
        if kernel in ("forward", *FORWARD_PHASES, "onchip"):
            layer = self._layer(Deal(1), table=table)
            self.permutation = layer.tensors["permutation"]
            if kernel == "onchip":
                launch_onchip(layer, self.y, self.pre_activation)
            elif kernel == "forward":
                launch_forward(layer, self.y, self.pre_activation, self.hidden)
            else:
                launch_up(layer, self.pre_activation, self.hidden)
                launch_down(layer, self.y, self.hidden)
            return [self.y, self.pre_activation]
        backend = "triton-single" if kernel == "backward" else "triton-split"
        layer = self._layer(Deal(1, self.permutation), backend, table=table)
        launch_backward(layer, self.grad_y, self.pre_activation, [self.grad_x, *self.grads], need_routing=False)
        return [self.grad_x, *self.grads]


def compiles(arguments: tuple[Case, str, Tile, torch.dtype]) -> str | None:
    """Runs a candidate on few tokens, which leaves it in Triton's cache; returns what is wrong with it."""
    shape, kernel, tile, dtype = arguments
    try:
        problem = Operands(shape, "cuda", dtype, num_tokens=1024)
        shipped = problem.shipped("forward")
        assert shipped is not None
        problem.run("forward", shipped)  # the permutation, for the backward
        problem.run(kernel, tile)
        torch.cuda.synchronize()
    except Exception as error:  # does not fit, in any of many ways
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
    return None


def tune(problem: Operands, kernel: str, tiles: list[Tile], watch: Stopwatch, rounds: int) -> list[Any]:
    """(tile, milliseconds) of those that compute what the shipped one does, fastest first."""
    shipped = problem.shipped(kernel)
    assert shipped is not None
    first = problem.shipped("forward")
    assert first is not None
    problem.run("forward", first)
    expected = [t.clone() for t in problem.run(kernel, shipped)]
    right = {tile: tile for tile in (shipped, *tiles) if differs(problem.run(kernel, tile), expected) < 1e-2}
    variants = {str(tile): timed(functools.partial(problem.run, kernel, tile), watch) for tile in right}
    timings = interleaved(variants, 0, min_rounds=rounds)
    return sorted(((tile, timings[str(tile)][0].median) for tile in right), key=lambda pair: pair[1])


def main() -> None:
    names = [shape.name for shape in model.CASES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiles", description=__doc__)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--shapes", nargs="+", choices=names, default=names)
    parser.add_argument("--minutes", type=float, default=9.0, help="no shape is begun after so many")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="a folder")
    arguments = parser.parse_args()
    console, start, dtype = Console(width=120), time.monotonic(), torch.bfloat16
    results: list[dict[str, Any]] = []
    path = arguments.output / f"tiles-{torch.cuda.get_device_name().replace(' ', '-').lower()}.json"
    arguments.output.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(os.cpu_count() or 1, 14), mp_context=context) as pool:
        for shape in (s for s in model.CASES if s.name in arguments.shapes):
            for kernel in arguments.kernels:
                if time.monotonic() - start > 60 * arguments.minutes:
                    break
                problem = Operands(shape, "cuda", dtype)
                shipped = problem.shipped(kernel)
                if shipped is None:
                    continue
                tiles = list(candidates(kernel))
                if kernel == "onchip":
                    tiles = [replace(tile, block_k=shipped.block_k) for tile in tiles]
                reasons = list(pool.map(compiles, ((shape, kernel, tile, dtype) for tile in tiles)))
                usable = [tile for tile, reason in zip(tiles, reasons, strict=True) if reason is None]
                ranked = tune(problem, kernel, usable, Stopwatch("cuda"), ROUNDS)
                table = Table("tile", "ms", "÷ shipped", title=f"{shape.name}, {kernel}: {len(usable)} of {len(tiles)}")
                of_shipped = next(ms for tile, ms in ranked if tile == shipped)
                for tile, ms in ranked[:8]:
                    table.add_row(str(asdict(tile)), f"{ms:.3f}", f"{ms / of_shipped:.3f}")
                console.print(table)
                for tile, ms in ranked:
                    entry = {"shape": shape.name, "kernel": kernel, "milliseconds": ms, "shipped": tile == shipped}
                    results.append({**entry, "tile": asdict(tile)})
                found = {"environment": environment("cuda"), "results": results}
                path.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
