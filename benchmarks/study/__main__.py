"""`python -m benchmarks.study`: random partition with several share rates, and rivals, against the dense model.

Writes study.json, study.png and study.md, and what --resume needs into the folder `runs`. The default size takes an
hour on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.environment import environment, file_name
from benchmarks.study import plot, report, statistics
from benchmarks.study.records import Records
from benchmarks.study.scheduler import carry_out
from benchmarks.study.train import DEFAULT, FULL, Study


def main(argv: Sequence[str] | None = None, *, default: Study = DEFAULT, full: Study = FULL) -> None:
    """`default` and `full`: what is studied without and with --full."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--full", action="store_true", help="larger models and data, more seeds: for a GPU")
    parser.add_argument("--seeds", type=int, help=f"at least 2; {default.seeds}, or {full.seeds} with --full")
    parser.add_argument("--output", type=Path, help="a folder; results/overfit-study-<device> beside the benchmarks")
    parser.add_argument("--resume", action="store_true", help="go on with the runs that the folder has")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda with --full only")
    parser.add_argument("--workers", type=int, help="processes; one for each core, or one on a GPU")
    arguments = parser.parse_args(argv)

    study = full if arguments.full else default
    if arguments.seeds is not None:
        study = replace(study, seeds=arguments.seeds)
    if study.seeds < 2:
        parser.error(f"--seeds must be 2 or more, got {study.seeds}: one seed gives no interval")
    device = arguments.device
    if device == "auto":
        device = "cuda" if arguments.full and torch.cuda.is_available() else "cpu"
    workers = arguments.workers or (1 if device == "cuda" else os.cpu_count() or 1)
    if workers < 1:
        parser.error(f"--workers must be 1 or more, got {workers}")
    machine = {**environment(device), "threads": 1}
    name = f"overfit-study-{file_name(machine['device'])}" + ("-full" if arguments.full else "")
    output: Path = arguments.output or Path(__file__).parents[1] / "results" / name
    try:
        records = Records(output / "runs", study, machine, resume=arguments.resume)
    except ValueError as error:
        parser.error(str(error))

    console = Console()
    with progress_bar(console) as progress:
        runs = study.runs()
        bar = progress.add_task("trainings", total=len(runs), completed=sum(map(records.is_done, runs)))
        carry_out(study, records, workers, device, lambda: progress.advance(bar))
    write(study, records, output, console)


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=600,  # trainings come seconds apart, and are not equally long
    )


def write(study: Study, records: Records, output: Path, console: Console) -> None:
    """study.json, study.md and study.png."""
    results = {run: records.results[run] for run in study.runs()}
    comparisons = statistics.compare(results)
    machine = records.environment
    text = report.as_text(study, machine, results, comparisons)
    content = report.as_json(study, machine, results, comparisons)
    (output / "study.json").write_text(json.dumps(content) + "\n")  # thousands of numbers: not a line for each
    (output / "study.md").write_text(text)
    title = f"{study.seeds} seeds, {machine['device']}, PyTorch {torch.__version__}"
    plot.draw(results, comparisons, title, output / "study.png")
    console.print(Markdown(text))
    console.print(f"written to {output}")


if __name__ == "__main__":
    main()
