"""`python -m ewa_kernels.aot`: compiles every shipped kernel configuration without a GPU, and reports what came out.

The launchers run as they do on a GPU, on tensors without memory: what is compiled is what a launch would compile.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from .kernels import forms
from .kernels.triton import averaging, configs, cublas, groups, linear, merging, moe_ffn, permutation
from .kernels.triton.configs import RowsTile, Tile
from .kernels.triton.unlaunched import Driver, Noted
from .problem import Deal, Inputs, Options, Places, Problem
from .ptx import hand_off_problems, sum_problems

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
DTYPES = ("bfloat16", "float16", "float32", "tf32")
# What a block may have, in bytes (CUDA programming guide, technical specifications).
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
WHERE = f"{__package__}.kernels.triton"  # and there, what is launched by which name:
KERNELS = {
    "forward": "forward.forward_kernel",
    "forward up": "split.half_kernel",
    "forward down": "split.half_kernel",
    "backward": "backward.backward_kernel",
    "backward pre": "backward.pre_kernel",
    "backward weights": "backward.weights_kernel",
    "backward x": "backward.grad_x_kernel",
    "onchip": "onchip.onchip_kernel",
    "linear gather": "linear.linear_kernel",
    "linear scatter": "linear.linear_kernel",
    "linear gather backward": "linear.linear_kernel",
    "linear scatter backward": "linear.linear_kernel",
    "linear weights backward": "linear.weights_kernel",
    "linear sums backward": "rows.gather_kernel",
    "gather": "rows.gather_kernel",
    "gather backward": "rows.gather_kernel",
    "gather dealt backward": "rows.gather_kernel",
    "activate": "rows.activate_kernel",
    "activate backward": "rows.activate_backward_kernel",
    "scatter": "rows.scatter_kernel",
    "scatter backward": "rows.scatter_kernel",
    "sums backward": "rows.sums_kernel",
    "average": "averaging.average_kernel",
    "merge": "merging.merge_kernel",
    "groups": "groups.groups_kernel",
    "permutation": "permutation.permutation_kernel",
}
PASSES = tuple(name for name, path in KERNELS.items() if path.startswith("rows.") and "linear" not in name)
LINEAR = {  # what has the tiles
    "linear gather": "forward up",
    "linear scatter": "forward up",
    "linear gather backward": "backward x",
    "linear scatter backward": "backward x",
    "linear weights backward": "backward weights",
}
MULTIPLIES = ("forward", "backward", *configs.PHASES, "onchip", *LINEAR)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration, and what it is compiled for."""

    kernel: str  # of KERNELS
    tile: Tile | RowsTile
    architecture: str
    dtype: str
    gated: bool = False  # then with SiLU, without biases
    dropout: bool = False
    again: bool = False  # "forward up", for a backward that has no pre_activation: hidden is not wanted
    routed: bool = False  # with a partition that is given, and two weighted choices a token
    saved: str = "full"  # what is kept for backward
    stochastic: bool = False  # rounding, of "average"
    odd_address: bool = False  # of what "average" averages in place; no other kernel sees one
    d_model: int = 768  # for "onchip", as many as fit
    d_ff: int = 3072

    @property
    def capability(self) -> int:
        return int(self.architecture.removeprefix("sm_"))

    @property
    def default(self) -> bool:
        """Whether backend="auto" may pick it."""
        if self.kernel not in PASSES:
            return self.tile not in configs.CANDIDATES.get(self.kernel, ())
        known = {(entry.capability, entry.itemsize) for entry in forms.entries()}
        return not self.routed and (self.capability // 10, _torch_dtype(self.dtype).itemsize) in known

    @property
    def config(self) -> str:
        of_others = {
            "linear sums backward": str(configs.ROWS_TILES[0]),
            "groups": f"{groups.BLOCKS} row blocks, {groups.EXPERTS} experts",
            "permutation": f"{permutation.BLOCK} rows",
            "merge": f"{merging.BLOCK} columns, {merging.NUM_WARPS} warps",
        }
        if self.kernel in of_others:
            return of_others[self.kernel]
        if self.kernel == "average":
            words = [f"{averaging.TILE.block_n} columns, {averaging.TILE.num_warps} warps"]
            return ", ".join(words + ["stochastic rounding"] * self.stochastic + ["odd address"] * self.odd_address)
        kind = "biases" if "linear" in self.kernel else "gated silu" if self.gated else "gelu, biases"
        words = [str(self.tile), kind]
        sizes = [f"D={self.d_model} F={self.d_ff}"] if (self.d_model, self.d_ff) != (768, 3072) else []
        words += ["again"] * self.again + ["dropout"] * self.dropout + ["routed"] * self.routed
        return ", ".join(words + [self.saved] * (self.saved != "full") + sizes)


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case."""

    kernel: str
    config: str
    default: bool
    dtype: str
    architecture: str
    registers: int
    spill_stores: int  # bytes
    spill_loads: int
    shared_bytes: int
    wgmma: int  # instructions; only Hopper has them
    wgmma_serialized: bool
    warnings: list[str]

    def problems(self) -> list[str]:
        """What keeps this configuration from being shipped as a default."""
        found = list(self.warnings)
        # In float32 without tensor cores ptxas stops at 128 or so registers, for more warps at a time, and pays with a
        # few bytes. At 255 it had no choice.
        chosen = self.dtype == "float32" and self.registers < 255 and self.spill_loads <= 32
        if (self.spill_stores or self.spill_loads) and not chosen:
            found.append(f"spills: {self.spill_stores} bytes stored, {self.spill_loads} loaded")
        if self.wgmma_serialized:
            found.append("each wgmma waits for the one before")
        multiplies = self.kernel in MULTIPLIES and self.dtype != "float32"
        if self.architecture == "sm_90" and self.wgmma == 0 and multiplies:
            found.append("no wgmma")
        limit = SHARED_MEMORY[int(self.architecture.removeprefix("sm_"))]
        if self.shared_bytes > limit:
            found.append(f"{self.shared_bytes} bytes of shared memory, at most {limit}")
        return found


def cases(architecture: str, dtypes: tuple[str, ...] = DTYPES) -> Iterator[Case]:
    """Every entry of the tables for an architecture, with its variants."""
    capability = int(architecture.removeprefix("sm_"))
    for dtype in dtypes:
        tiles = configs.table(capability, _torch_dtype(dtype), "tf32" if dtype == "tf32" else "ieee")
        of_forward = Case("forward", tiles["forward"][0], architecture, dtype)
        for kernel in MULTIPLIES:
            for variant in (v for v in _variants(kernel) if "saved" not in v or "forward coded" in tiles):
                case = replace(of_forward, kernel=kernel, **variant)
                is_tight, phase = case.dropout or case.routed, LINEAR.get(kernel, kernel)
                of_variant = configs.tiles_of(tiles, phase, case.d_model, case.d_ff, is_tight, case.saved != "full")
                # Other sizes are compiled with the first alone.
                for tile in of_variant[:1] if "d_model" in variant else of_variant:
                    yield replace(case, tile=tile)
            if architecture == "sm_90" and dtype == "bfloat16":
                for tile in configs.CANDIDATES.get(kernel, ()):
                    yield replace(of_forward, kernel=kernel, tile=tile)
        if dtype == dtypes[0]:  # indices alone
            yield from (replace(of_forward, kernel=kernel) for kernel in ("groups", "permutation"))
        if dtype != "tf32":
            average = replace(of_forward, kernel="average", tile=averaging.TILE)
            yield from (average, replace(average, odd_address=True))
            yield replace(of_forward, kernel="merge")
            yield replace(of_forward, kernel="linear sums backward")
            if dtype != "float32":
                yield replace(average, stochastic=True)
            for kernel in PASSES if dtype != "float16" else ():  # which is as bfloat16 is
                for variant in _variants_of_pass(kernel, dtype):
                    yield replace(of_forward, kernel=kernel, **variant)


def _variants(kernel: str) -> Iterator[dict[str, Any]]:
    """What makes a difference to a kernel."""
    if kernel in ("forward up", "backward pre"):  # the form that "auto" takes then
        yield from ({"saved": saved, "gated": gated} for saved in ("8bit", "4bit") for gated in (False, True))
    if kernel in configs.FORWARD_PHASES:  # a half of "forward", with registers to spare
        further = ({"gated": True}, {"again": True}, {"dropout": True}, {"gated": True, "again": True})
        yield from ({}, *further) if kernel == "forward up" else ({},)
        return
    ragged, unaligned = {"d_model": 1000, "d_ff": 4000}, {"d_model": 770, "d_ff": 3075}  # by 64 and 16, and by 8
    if kernel in LINEAR:
        yield from ({}, ragged, unaligned)
        return
    for gated in (False,) if kernel == "backward x" else (False, True):
        yield {"gated": gated}
        yield {"gated": gated, "routed": True}
        if kernel not in configs.BACKWARD_PHASES[1:]:
            yield {"gated": gated, "dropout": True}
        if kernel != "onchip":
            yield {"gated": gated, **unaligned}
    if kernel != "onchip":
        yield ragged
    if kernel == "forward":  # whose tile is one for few registers already
        yield from ({**ragged, "dropout": True}, {**ragged, "routed": True})


def _variants_of_pass(kernel: str, dtype: str) -> Iterator[dict[str, Any]]:
    """What makes a difference to a pass over rows."""
    wide, narrow = ({"tile": tile} for tile in configs.ROWS_TILES)
    sizes = {"d_model": 384, "d_ff": 1152}  # for which the narrow tile is
    yield {**narrow, **sizes}
    for gated in (False, True) if kernel.startswith("activate") else (False,):
        yield {**wide, "gated": gated}
        yield {"tile": configs.UNALIGNED_ROWS_TILE, "gated": gated, "d_model": 770, "d_ff": 3075}
        if kernel.startswith("activate"):
            yield {**wide, "gated": gated, "dropout": True}
        # PyTorch's products of given groups are for bfloat16; a deal is none.
        if dtype == "bfloat16" and "dealt" not in kernel:
            yield {**wide, "gated": gated, "routed": True}


def compile_case(case: Case) -> Report:
    """Compiles a case and disassembles the result."""
    kernel, log = _compile(case)
    sass = ""
    if case.architecture == "sm_90" and case.kernel in MULTIPLIES:  # no other has wgmma, and it takes long
        with tempfile.TemporaryDirectory() as folder:
            (cubin := Path(folder, "kernel.cubin")).write_bytes(kernel.asm["cubin"])
            sass = subprocess.check_output([TOOLS / "cuobjdump", "-sass", cubin], text=True)
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if len(registers) != 1 or len(spills) != 1:
        raise RuntimeError(f"ptxas said something else than expected about {case}:\n{log}")
    wgmma = len(re.findall(r"\bHGMMA\b", sass))
    # A group of them arrives once and then runs; where each waits for the one before, each arrives.
    arrivals = len(re.findall(r"\bWARPGROUP\.ARRIVE\b", sass))
    return Report(
        kernel=case.kernel,
        config=case.config,
        default=case.default,
        dtype=case.dtype,
        architecture=case.architecture,
        registers=int(registers[0]),
        spill_stores=int(spills[0][0]),
        spill_loads=int(spills[0][1]),
        shared_bytes=kernel.metadata.shared,
        wgmma=wgmma,
        wgmma_serialized=bool(re.search(r"C751[0-5]", log)) or arrivals >= wgmma > 0,
        # C7517 tells that a result is used at once, which is meant.
        warnings=[
            line.strip() for line in log.splitlines() if re.search(r"warning|\(C75", line) and "(C7517)" not in line
        ]
        + hand_off_problems(kernel.asm["ptx"])
        + sum_problems(kernel.asm["ttgir"], is_expected=case.routed and case.kernel in ("backward", "backward pre")),
    )


def compile_all(chosen: list[Case]) -> Iterator[Report]:
    """Reports in the order of the cases; as many are compiled at a time as there are cores."""
    # Not forked: that would copy the locks of torch's threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        yield from pool.map(compile_case, chosen)


def _compile(case: Case) -> tuple[Any, str]:
    """The compiled kernel, and what ptxas said."""
    # For the rest of the process: nothing is launched in it.
    triton.runtime.driver.set_active(Driver(case.capability))
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.dtype == "tf32" else "ieee"
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    with contextlib.redirect_stdout(log), contextlib.ExitStack() as stack:
        noted = {path: Noted(pkgutil.resolve_name(f"{WHERE}.{path}")) for path in KERNELS.values()}
        for path, stand_in in noted.items():
            stack.enter_context(mock.patch(f"{WHERE}.{path}", stand_in))
        _launch(case)
        kernel = noted[KERNELS[case.kernel]].launched[0 if case.kernel == "forward up" else -1]()
    return kernel, log.getvalue()


def _launch(case: Case) -> None:
    """Launches what a call does that has the case's kernel, on tensors without memory."""
    dtype = _torch_dtype(case.dtype)
    width = case.tile.block_k if case.kernel == "onchip" and isinstance(case.tile, Tile) else 0
    (num_tokens, top_k), num_experts = ((25216, 2) if case.routed else (50432, 1)), 4
    d_model, d_ff = width or case.d_model, 4 * width or case.d_ff
    num_up = d_ff * (1 + case.gated)

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    routing_weights = new(num_tokens, top_k, dtype=torch.float32) if case.routed else None
    up_bias, down_bias = (None, None) if case.gated else (new(num_experts, num_up), new(num_experts, d_model))
    up_weight, down_weight = new(num_experts, num_up, d_model), new(num_experts, d_model, d_ff)
    inputs = Inputs(new(num_tokens, d_model), up_weight, up_bias, down_weight, down_bias, routing_weights)
    given = [new(num_tokens * top_k, dtype=torch.int32), new(num_experts + 1, dtype=torch.int32)]
    deal = Deal(0, *given) if case.routed else Deal(0)
    kernel, _, form = case.kernel.partition(" ")
    backend = "triton-onchip" if kernel == "onchip" else "triton-split" if form else "triton-single"
    backend = "cublas" if case.kernel in PASSES else backend
    options = Options("silu" if case.gated else "gelu", case.gated, 0.1 if case.dropout else 0.0, backend, case.saved)
    tiles = dict.fromkeys(MULTIPLIES, (case.tile,))
    kept = {"table": tiles, "num_programs": 132}
    problem = replace(Problem.of(inputs, case.routed, options, saved=case.saved), kept=kept)
    if kernel == "groups":
        groups.tabulate(given[1], num_tokens, num_tokens // 128, 128)
    elif kernel == "permutation":
        permutation.random_permutation(num_tokens, 0, inputs.x.device)
    elif kernel == "linear":
        places = Places(given[0], given[1], "gather" in form, "scatter" in form)
        problem = Problem.of_linear(num_tokens, up_weight, "triton", dtype, (dtype, dtype, dtype))
        problem, needs_rows = replace(problem, kept=kept), form in ("gather backward", "scatter backward")
        if form.endswith("backward"):
            needed = (needs_rows, not needs_rows, not needs_rows)
            linear.backward(problem, places, new(num_tokens, d_ff), inputs.x, up_weight, needed)
        else:
            linear.forward(problem, places, inputs.x, up_weight, up_bias)
    elif kernel == "merge":
        merging.merge_experts([up_weight, down_weight])
    elif case.kernel in PASSES:
        if case.kernel.endswith("backward"):
            is_again = "dealt" in case.kernel
            product = None if is_again else problem.new_pre_activation()
            again = deal if is_again else deal._replace(permutation=given[0])
            cublas.backward(problem, inputs.x, inputs, again, product, [t is not None for t in inputs])
        else:
            cublas.forward(problem, inputs, deal)
    elif kernel == "average":
        # With an odd address is only memory that exists.
        experts = torch.empty(4 * 64 + 1, dtype=dtype)[1:].view(4, 64) if case.odd_address else up_weight
        share_rate = torch.empty(1, dtype=torch.float64, device=experts.device)
        seed = torch.empty(1, dtype=torch.int64, device=experts.device) if case.stochastic else None
        averaging.average([experts], share_rate, None, seed)
    elif kernel == "backward" or case.again:
        pre_activation = problem.new_pre_activation() if kernel == "backward" else None
        moe_ffn.backward(problem, inputs.x, inputs, deal, pre_activation, [t is not None for t in inputs])
    else:
        moe_ffn.forward(problem, inputs, deal)


def _torch_dtype(dtype: str) -> torch.dtype:
    return torch.float32 if dtype == "tf32" else getattr(torch, dtype)


def main() -> int:
    """1 if a default configuration has a problem."""
    parser = argparse.ArgumentParser(prog="python -m ewa_kernels.aot", description=__doc__)
    parser.add_argument("--arch", choices=ARCHITECTURES, action="append", help="default: all; may be repeated")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: all; may be repeated")
    parser.add_argument("--kernel", choices=KERNELS, nargs="+", help="default: all; their defaults alone if given")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")

    chosen = [
        case
        for architecture in arguments.arch or ARCHITECTURES
        for case in cases(architecture, tuple(arguments.dtype or DTYPES))
        if arguments.kernel is None or (case.kernel in arguments.kernel and case.default)
    ]
    reports = []
    for report in compile_all(chosen):
        reports.append(report)
        if not arguments.json:
            print(_line(report), flush=True)
    if arguments.json:
        print(json.dumps([asdict(report) for report in reports], indent=1))
    return 1 if any(report.default and report.problems() for report in reports) else 0


def _line(report: Report) -> str:
    problems = "; ".join(report.problems())
    return (
        f"{report.architecture:7}{report.dtype:9} {report.kernel:24}{report.config:70}"
        f"{report.registers:4} registers {report.shared_bytes:7} bytes shared {report.wgmma:3} wgmma"
        f"{'' if report.default else '  not a default'}{'  ' + problems if problems else ''}"
    )


if __name__ == "__main__":
    sys.exit(main())
