"""`python -m benchmarks`: runs them, prints tables and writes `results/<device>.json`, and a plot of the experts."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import experts, ffn
from benchmarks.environment import environment


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=41, help="how often each variant runs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="a folder")
    parser.add_argument("--only", choices=("ffn", "experts"), help="default: both; on a GPU ffn is benchmarks.ffn_cuda")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()

    machine = environment()
    if arguments.device == "cuda":
        machine["device"] = torch.cuda.get_device_name()
    console = Console(width=110)
    console.print(machine)
    name = re.sub(r"\W+", "-", str(machine["device"])).strip("-").lower()
    arguments.output.mkdir(parents=True, exist_ok=True)

    def write(results: list[dict[str, object]], operation: str) -> None:
        path = arguments.output / f"{operation}-{name}.json"
        path.write_text(json.dumps({"environment": machine, "results": results}, indent=1) + "\n")
        console.print(f"written to {path}")

    if arguments.only != "experts" and arguments.device == "cpu":
        results = ffn.run(arguments.rounds)
        console.print(ffn_table(results))
        write(results, "ffn")
    if arguments.only != "ffn":
        results = experts.run(arguments.rounds, arguments.device)
        console.print(experts_table(results), targets_table(results, arguments.device))
        write(results, "experts")
        draw(results, f"{machine['device']}, PyTorch {machine['torch']}", arguments.output / f"experts-{name}.png")


def draw(results: list[dict[str, object]], title: str, path: Path) -> None:
    """Where there is matplotlib."""
    try:
        from benchmarks import plot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    plot.bars(results, title, path)


def ffn_table(results: list[dict[str, object]]) -> Table:
    table = Table("case", "variant", "median ms", "p20–p80 ms", "GFLOP/s", "÷ dense", title="FFN, forward+backward")
    for r in results:
        last = (f"{r['gflops']:.0f}", f"{r['ratio_to_dense']:.2f}")
        table.add_row(str(r["case"]), str(r["variant"]), *times(r), *last)
    return table


def experts_table(results: list[dict[str, object]]) -> Table:
    table = Table("operation", "variant", "median ms", "p20–p80 ms", "GB/s", title=str(results[0]["case"]))
    for r in results:
        table.add_row(str(r["operation"]), str(r["variant"]), *times(r), f"{r['gigabytes_per_second']:.1f}")
    return table


def targets_table(results: list[dict[str, object]], device: str) -> Table:
    table = Table("variant", "÷", "measured", "target")
    for target, ratio in experts.against_targets(results, device):
        table.add_row(target.variant, target.baseline, f"{ratio:.3f}", f"at most {target.ratio:.3f}")
    return table


def times(result: dict[str, object]) -> tuple[str, str]:
    return f"{result['median']:.1f}", f"{result['p20']:.1f}–{result['p80']:.1f}"


if __name__ == "__main__":
    main()
