"""`python -m benchmarks.products`: who makes a CPU's matrix products, and is that the right one?

Of each case: what was chosen, and what forward and backward take with each that could have been, forced by the
environment. Written down before the first run: what is chosen is nowhere more than 3 % slower than another, and the
wrong one at least 5 % slower in most cases.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

import ewa_kernels.calls as calls
from benchmarks import timing
from benchmarks.cases import CPU_CASES, Case
from benchmarks.environment import environment, file_name
from benchmarks.layer import training_pass
from benchmarks.parity import Gate
from benchmarks.peers import OURS, peers
from benchmarks.problem import make
from benchmarks.report import RESULTS
from benchmarks.timing import Sample, Variant
from ewa_kernels import problem as problems
from ewa_kernels.kernels.blocked.products import ENVIRONMENT, candidates


@contextlib.contextmanager
def forced(who: str, kept: dict[str, Any]) -> Iterator[None]:
    """Calls are described anew, or as they were in `kept`, and their products made by "auto", "cpp" or "torch"."""
    described, made = kept.setdefault(who, ({}, {}))
    with (
        mock.patch.dict(os.environ, {ENVIRONMENT: who}),
        mock.patch.object(calls, "_problems", described),
        mock.patch.object(problems, "_made", made),
    ):
        yield


def measure(case: Case, seconds: float) -> dict[str, Any]:
    problem, watch = make(case, "cpu"), timing.Stopwatch("cpu")
    function = next(peer for peer in peers() if peer.name == OURS).build(case)
    gate = Gate(problem)
    kept: dict[str, Any] = {}
    everyone = ("auto", "cpp", "torch") if len(candidates(case.dtype)) > 1 else ("auto", "torch")
    for who in everyone:
        with forced(who, kept):
            gate.check(function, problem)
    (chosen,) = {found.kept["products"] for found in kept["auto"][1].values()}

    def variant_of(who: str) -> Variant:
        run = training_pass(function, problem, watch)

        def variant() -> Sample:
            with forced(who, kept):
                return run()

        return variant

    samples = timing.rounds({who: variant_of(who) for who in everyone}, seconds)
    result: dict[str, Any] = {"case": case.name, "dtype": case.dtype_name, "sizes": case.sizes}
    result |= {"chosen": "cpp" if chosen.by_cpp else "torch", "product_dtype": str(chosen.dtype).removeprefix("torch.")}
    for who, taken in samples.items():
        result[who] = timing.timings(taken)[-1].as_dict()
        result[who]["to_auto"] = timing.ratios(taken, samples["auto"])[-1].as_dict()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description=__doc__)
    parser.add_argument("--seconds", type=float, default=8, help="for each case; default %(default)s")
    options = parser.parse_args()
    torch.manual_seed(0)
    about = environment("cpu")
    table = Table("", "chosen", "auto, ms", "cpp ÷ auto", "torch ÷ auto")
    results = []
    for case in CPU_CASES:
        result = measure(case, options.seconds)
        results.append(result)
        ratios = (result.get(who, {}).get("to_auto") for who in ("cpp", "torch"))
        table.add_row(
            str(case),
            f"{result['chosen']}, {result['product_dtype']}",
            f"{result['auto']['median']:.1f}",
            *("–" if r is None else f"{r['median']:.2f} ({r['p20']:.2f} to {r['p80']:.2f})" for r in ratios),
        )
    path = RESULTS / f"products-{file_name(about['device'])}.json"
    path.write_text(json.dumps({"environment": about, "results": results}, indent=1) + "\n")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
