"""`python -m benchmarks`: runs them all, prints a table and writes `results/<device>.json`."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import ffn
from benchmarks.environment import environment


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=41, help="how often each variant runs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="a folder")
    arguments = parser.parse_args()

    machine = environment()
    console = Console(width=110)
    console.print(machine)
    results = ffn.run(arguments.rounds)
    table = Table("case", "variant", "median ms", "p20–p80 ms", "GFLOP/s", "÷ dense", title="FFN, forward+backward")
    for r in results:
        table.add_row(
            str(r["case"]),
            str(r["variant"]),
            f"{r['median']:.1f}",
            f"{r['p20']:.1f}–{r['p80']:.1f}",
            f"{r['gflops']:.0f}",
            f"{r['ratio_to_dense']:.2f}",
        )
    console.print(table)

    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / (re.sub(r"\W+", "-", str(machine["device"])).strip("-").lower() + ".json")
    path.write_text(json.dumps({"environment": machine, "results": results}, indent=1) + "\n")
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
