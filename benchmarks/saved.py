"""`python -m benchmarks.saved`: what each form of `saved=` keeps, errs and costs, beside what PyTorch offers.

Peers: gather-bmm-scatter as it is, under activation checkpointing, and with its activations packed to int8 by
`saved_tensors_hooks`. Inductor's own quantisation of activations is for GPUs and tensors of 100 MB, and is not here.
The results go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import ewa_kernels as ewa
from benchmarks import timing
from benchmarks.cases import Case
from benchmarks.environment import environment, file_name
from benchmarks.layer import training_pass
from benchmarks.parity import Function
from benchmarks.peers import BMM, peers
from benchmarks.problem import SEED, Problem, make, reference
from ewa_kernels.problem import SAVED

RESULTS = Path(__file__).parent / "results"
CASES = (
    Case("ViT-S", 8 * 197, 384, 1536),
    Case("ViT-B", 8 * 197, 768, 3072),
    Case("ViT-B", 8 * 197, 768, 3072, dtype=torch.bfloat16),
    Case("SwiGLU", 2048, 512, 1408, activation="silu", gated=True, bias=False),
    Case("Swin stage 1", 8 * 3136, 96, 384),
)
# Of gradients, in the order of the table.
GRADIENTS = ("x", "up_weight", "down_weight")


def ours(case: Case, saved: str) -> Function:
    def function(p: Problem, seed: int | None) -> Tensor:
        drawn = ewa.functional.draw_seed(p.x) if seed is None else seed
        operands = (p.x, p.up_weight, p.up_bias, p.down_weight, p.down_bias)
        options: dict[str, Any] = {"activation": case.activation, "gated": case.gated, "saved": saved}
        return ewa.functional.moe_ffn(*operands, seed=drawn, **options)

    return function


class Packing:
    """Rows of floats in int8, each with a scale of its own, of all that is kept but leaves."""

    def __init__(self) -> None:
        self.bytes = 0  # of what was packed

    def pack(self, tensor: Tensor) -> Any:
        is_parameter = tensor.is_leaf or (tensor._base is not None and tensor._base.is_leaf)
        if not tensor.is_floating_point() or tensor.ndim < 2 or is_parameter:
            return tensor
        scale = tensor.abs().amax(-1, keepdim=True) / 127 + 1e-20
        codes = (tensor / scale).round().to(torch.int8)
        self.bytes += codes.nbytes + scale.nbytes
        return codes, scale, tensor.dtype

    def unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        codes, scale, dtype = kept
        return codes.to(dtype) * scale


def functions_of(case: Case, packing: Packing) -> dict[str, Function]:
    bmm = next(peer for peer in peers() if peer.name == BMM).build(case)

    def in_int8(p: Problem, seed: int | None) -> Tensor:
        with saved_tensors_hooks(packing.pack, packing.unpack):
            return bmm(p, seed)

    def checkpointed(p: Problem, seed: int | None) -> Tensor:
        drawn = ewa.functional.draw_seed(p.x) if seed is None else seed
        return checkpoint(bmm, p, drawn, use_reentrant=False)

    forms: dict[str, Function] = {f'saved="{saved}"': ours(case, saved) for saved in SAVED}
    return {**forms, BMM: bmm, f"{BMM}, checkpointed": checkpointed, f"{BMM}, int8 by hooks": in_int8}


def kept_bytes(function: Function, problem: Problem) -> int:
    """Of all that is kept for backward, but for parameters and what has no gradient: the permutation."""
    parameters = {t.untyped_storage().data_ptr() for name, t in problem.leaves.items() if name != "x"}
    held: list[Tensor] = []  # while it lasts, so that no address comes twice

    def hold(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with saved_tensors_hooks(hold, lambda t: t):
        function(problem, SEED)
    kept = {t.untyped_storage().data_ptr(): t.nbytes for t in held if t.dtype not in (torch.int32, torch.int64)}
    return sum(size for address, size in kept.items() if address not in parameters)


def errors(function: Function, problem: Problem, exact: dict[str, Tensor]) -> dict[str, float]:
    leaves = [problem.leaves[name] for name in GRADIENTS]
    grads = torch.autograd.grad(function(problem, SEED), leaves, problem.grad_y)
    return {
        name: float((grad.double() - exact[name]).norm() / exact[name].norm())
        for name, grad in zip(GRADIENTS, grads, strict=True)
    }


def exact_gradients(problem: Problem) -> dict[str, Tensor]:
    wide = problem.to(torch.float64)
    leaves = [wide.leaves[name] for name in GRADIENTS]
    return dict(zip(GRADIENTS, torch.autograd.grad(reference(wide), leaves, wide.grad_y), strict=True))


def measure(case: Case, device: str, seconds: float) -> list[dict[str, Any]]:
    problem, watch = make(case, device), timing.Stopwatch(device)
    packing = Packing()
    functions, exact = functions_of(case, packing), exact_gradients(problem)
    samples = timing.rounds({n: training_pass(f, problem, watch) for n, f in functions.items()}, seconds)
    full, rows = samples['saved="full"'], []
    for name, function in functions.items():
        ratio = timing.ratios(samples[name], full)[-1]
        packing.bytes = 0
        bytes_kept = kept_bytes(function, problem) + packing.bytes  # which hooks outside do not see
        if "checkpointed" in name:
            bytes_kept += problem.x.nbytes  # as an argument of what is called again
        rows.append(
            {
                "name": name,
                "bytes a token": bytes_kept / case.num_tokens,
                "errors": errors(function, problem, exact),
                "ms": timing.timings(samples[name])[-1].median,
                "ratio": [ratio.median, ratio.p20, ratio.p80],
                "peak MB": timing.peak_bytes(training_pass(function, problem, watch), device) / 1e6,
            }
        )
    return rows


def print_rows(case: Case, rows: list[dict[str, Any]], console: Console) -> None:
    names = [f"error of grad {name}" for name in GRADIENTS]
    table = Table(str(case), "bytes a token", *names, "ms", 'to saved="full"', "peak MB", title=case.sizes)
    for row in rows:
        median, low, high = row["ratio"]
        of_grads = [f"{row['errors'][name]:.4f}" for name in GRADIENTS]
        cells = [f"{row['bytes a token']:,.0f}", *of_grads, f"{row['ms']:.1f}"]
        table.add_row(row["name"], *cells, f"{median:.3f} ({low:.3f} to {high:.3f})", f"{row['peak MB']:.0f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saved", description=__doc__)
    devices, default = ("cpu", "cuda"), "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=devices, default=default, help="default here: %(default)s")
    parser.add_argument("--seconds", type=float, default=20, help="for each case; default %(default)s")
    options = parser.parse_args()
    about, console = environment(options.device), Console(width=150)
    console.print(about)
    results = {}
    for case in CASES:
        rows = results[str(case)] = measure(case, options.device, options.seconds)
        print_rows(case, rows, console)
    path = RESULTS / f"saved-{file_name(about['device'])}.json"
    path.write_text(json.dumps({"environment": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
