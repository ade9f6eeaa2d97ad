"""`python -m benchmarks`: measures, prints tables, writes `results/<device>.json` and pictures,
and the tables of README and docs.

`--base <commit>` compares that commit with the working tree instead.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import cases, compare, report, scaling
from benchmarks.environment import environment, file_name
from benchmarks.run import BUDGET, SECTIONS, run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    devices = ("cpu", "cuda")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=devices, default=default, help="default here: %(default)s")
    parser.add_argument("--budget", type=float, help=f"seconds that it may take, about; default {BUDGET}")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="default: all")
    parser.add_argument("--case", help="the layer's cases that have this in their names")
    parser.add_argument("--quick", action="store_true", help="two tiny cases of the layer: does it work?")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="a folder")
    parser.add_argument("--base", metavar="COMMIT", help="compare this commit with the working tree")
    parser.add_argument("--cold", action="store_true", help="compile all anew: first calls without any cache")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU and a PyTorch that can use it")
    budget = options.budget or BUDGET[options.device]
    chosen = cases.QUICK_CASES if options.quick else cases.cases(options.device)
    if options.case:
        chosen = tuple(case for case in chosen if options.case.lower() in str(case).lower())
        if not chosen:
            parser.error(f"--case {options.case!r}: no case has that in its name")
    console = Console(width=150)
    if options.base:
        ratios = compare.compare(options.base, options.device, chosen, budget)
        console.print(compare.table(ratios, options.base))
        return 0

    with tempfile.TemporaryDirectory() as cache:
        if options.cold:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TRITON_CACHE_DIR"] = cache
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / file_name(environment(options.device)["device"])

        def save(result: dict[str, Any]) -> None:
            path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")

        start = time.monotonic()
        result = run(options.device, budget, options.only, chosen, save, console.print)
    console.print(result["environment"])
    report.print_run(result, console)
    written = [path.with_suffix(".json"), *_draw(result, path)]
    if options.output.resolve() == report.RESULTS:
        report.write()
        scaling.write()
        written += [report.README, report.PAGE, scaling.PAGE]
    console.print("written:", *(str(p) for p in written))
    console.print(f"{time.monotonic() - start:.0f} s")
    return 0


def _draw(result: dict[str, Any], path: Path) -> list[Path]:
    """Where there is matplotlib."""
    try:
        from benchmarks import plot
    except ImportError:
        print("no pictures: matplotlib is not installed")
        return []
    return plot.draw(result, path)


if __name__ == "__main__":
    sys.exit(main())
