"""`python -m benchmarks.pair`: a pair of `expert_linear` with the activation between them, beside the layer in one.

What it costs that what lies between the two products stays somebody else's code. Past the parity gate, all by turns.
"""

from __future__ import annotations

import argparse
import functools

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import ewa_kernels as ewa
from benchmarks import timing
from benchmarks.cases import PHASES, Case
from benchmarks.environment import environment
from benchmarks.layer import training_pass
from benchmarks.parity import Function, Gate
from benchmarks.peer import activate
from benchmarks.peers import BMM, OURS, peers
from benchmarks.problem import Problem, make

PAIR = "pair of expert_linear"
CASES = (Case("ViT-S", 8 * 197, 384, 1536), Case("ViT-B", 8 * 197, 768, 3072))


def pair(case: Case) -> Function:
    """The layer, by one product after the other."""
    offsets = torch.tensor(ewa.functional.expert_offsets(case.num_tokens, case.num_experts))

    def function(p: Problem, seed: int | None) -> Tensor:
        drawn = ewa.functional.draw_seed(p.x) if seed is None else seed
        permutation = ewa.functional.random_permutation(case.num_tokens, drawn, device=p.device)
        linear = functools.partial(
            ewa.functional.expert_linear, permutation=permutation, expert_offsets=offsets.to(p.device)
        )
        pre = linear(p.x, p.up_weight, p.up_bias, gather=True)
        return linear(activate(pre, case), p.down_weight, p.down_bias, scatter=True)

    return function


def measure(case: Case, device: str, seconds: float) -> list[tuple[str, ...]]:
    """Rows of the table: who, milliseconds of each phase, times as long as the layer in one, memory."""
    problem, watch = make(case, device), timing.Stopwatch(device)
    functions = {peer.name: peer.build(case) for peer in peers() if peer.name in (OURS, BMM)}
    functions[PAIR] = pair(case)
    gate = Gate(problem)
    for function in functions.values():
        gate.check(function, problem)
    del gate
    samples = timing.rounds({n: training_pass(f, problem, watch) for n, f in functions.items()}, seconds)
    rows = []
    for name, taken in samples.items():
        times = [f"{t.median:.1f} ({t.p20:.1f} to {t.p80:.1f})" for t in timing.timings(taken)]
        ratio = timing.ratios(taken, samples[OURS])[-1]
        call = training_pass(functions[name], problem, watch)
        memory = f"{timing.peak_bytes(call, device) / 1e6:.0f}"
        rows.append((name, *times, f"{ratio.median:.3f} ({ratio.p20:.3f} to {ratio.p80:.3f})", memory))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pair", description=__doc__)
    devices, default = ("cpu", "cuda"), "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=devices, default=default, help="default here: %(default)s")
    parser.add_argument("--seconds", type=float, default=20, help="for each case; default %(default)s")
    options = parser.parse_args()
    table = Table("", *(f"{phase}, ms" for phase in PHASES), "both, to the layer in one", "MB at a time")
    for case in CASES:
        table.add_section()
        table.add_row(str(case), case.sizes)
        for row in measure(case, options.device, options.seconds):
            table.add_row(*row)
    Console(width=150).print(environment(options.device), table)


if __name__ == "__main__":
    main()
