"""What a study found, as JSON and in words that claim no more."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.study.models import ARMS, DENSE
from benchmarks.study.statistics import LEVEL, Comparison, accuracies
from benchmarks.study.train import FINE_TUNED, SCRATCH, Result, Run, Study


def as_json(
    study: Study, environment: Mapping[str, object], results: Mapping[Run, Result], comparisons: Sequence[Comparison]
) -> dict[str, Any]:
    return {
        "environment": environment,
        "study": asdict(study),
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "runs": [{**run._asdict(), **result._asdict()} for run, result in sorted(results.items())],
    }


def as_text(
    study: Study, environment: Mapping[str, object], results: Mapping[Run, Result], comparisons: Sequence[Comparison]
) -> str:
    """In Markdown."""
    seconds = sum(result.seconds for result in results.values())
    cpu = sum(result.cpu_seconds for result in results.values())
    parts = [
        "# Does averaging help, with a router and without?",
        f"Made by `python -m benchmarks.study` at commit {environment['commit']}: {environment['device']}, PyTorch "
        f"{torch.__version__}. {len(results)} trainings took {seconds:,.0f} seconds together, {cpu:,.0f} of a CPU.",
        _setting(study),
        "## Accuracy on the test set, %",
        _accuracy_table(results),
        "Mean ± standard deviation over seeds. Arms share splits, so that their differences vary less.",
        "## Differences",
        _difference_table(comparisons),
        f"Points of accuracy, paired by seed; 95 % intervals of each comparison alone, by Student's t. Holm: p of the "
        f"paired t-test, corrected for all {len(comparisons)} comparisons.",
        "## What is significant",
        _significant(comparisons),
        "## What is not",
        _not_significant(comparisons),
        "## What this cannot say",
        _limits(study),
    ]
    return "\n\n".join(parts) + "\n"


def _setting(study: Study) -> str:
    tasks = "; ".join(
        f"{task.name}: {task.num_training:,} examples for training and {task.num_test:,} for testing, "
        f"width {task.d_model}, {task.depth} blocks, {task.num_steps} steps of {task.batch_size}"
        for task in study.tasks
    )
    return (
        f"{tasks}. {study.seeds} seeds, each with its own split, weights and batches, which all arms share. Every "
        f"other FFN becomes {study.num_experts} experts.\n\n"
        "- **Naive MoE**: a learned router, top-1, load-balance loss; tested with its router.\n"
        "- **Random partition**: tested folded, at the cost of the dense model.\n"
        f"- **EWA**: averaging after each step, β rising linearly from 0 towards {study.share_rate:g} at the last "
        "step; with a router it ends half-way.\n"
        "- **From scratch**: experts start apart.\n"
        "- **Fine-tuned**: all arms, the dense one too, start from one dense model, trained on other examples of an "
        "altered task (digits under noise, solids whole and without noise); experts start as copies.\n"
        "- Solids: point clouds of ten kinds, stretched, turned about the vertical and tilted at random, noised, cut "
        "off on one side."
    )


def _accuracy_table(results: Mapping[Run, Result]) -> str:
    cells = _cells(results)
    rows = [["", *(f"{task}, {start}" for task, start in cells)]]
    for arm in ARMS:
        values = [list(accuracies(results, *cell, arm).values()) for cell in cells]
        rows.append([arm, *(f"{statistics.fmean(v):.2f} ± {statistics.stdev(v):.2f}" for v in values)])
    return _table(rows)


def _cells(results: Mapping[Run, Result]) -> list[tuple[str, str]]:
    tasks = dict.fromkeys(run.task for run in results)
    return [(task, start) for task in tasks for start in (SCRATCH, FINE_TUNED)]


def _difference_table(comparisons: Sequence[Comparison]) -> str:
    rows = [["task", "start", "comparison", "difference", "95 % interval", "p", "Holm", ""]]
    for c in comparisons:
        mark = "significant" if c.is_significant else "alone only" if c.is_suggestive else ""
        interval = f"{_signed(c.low)} to {_signed(c.high)}"
        name = f"{c.arm} − {c.baseline}"
        rows.append([c.task, c.start, name, _signed(c.mean), interval, f"{c.p:.2g}", f"{c.holm:.2g}", mark])
    return _table(rows)


def _signed(points: float) -> str:
    return f"{points:+.2f}".replace("-", "−")


def _table(rows: Sequence[Sequence[str]]) -> str:
    first, *others = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([first, "|" + "---|" * len(rows[0]), *others])


def _significant(comparisons: Sequence[Comparison]) -> str:
    found = [c for c in comparisons if c.is_significant]
    if not found:
        return f"Nothing: after Holm's correction no comparison is significant at {100 * LEVEL:g} %."
    return "\n".join(f"- {_sentence(c)}, corrected p = {c.holm:.2g}." for c in found)


def _sentence(c: Comparison) -> str:
    word = "better" if c.mean > 0 else "worse"
    interval = f"95 % interval {_signed(c.low)} to {_signed(c.high)}"
    return f"{c.task}, {c.start}: {c.arm} is {word} than {c.baseline} by {abs(c.mean):.2f} points, {interval}"


def _not_significant(comparisons: Sequence[Comparison]) -> str:
    suggestive = [c for c in comparisons if c.is_suggestive]
    nothing = [c for c in comparisons if not (c.is_significant or c.is_suggestive)]
    lines = [
        f"- {_sentence(c)}: p = {c.p:.2g} alone, but {c.holm:.2g} as one of {len(comparisons)} comparisons. No claim."
        for c in suggestive
    ]
    if nothing:
        widest = max(max(abs(c.low), abs(c.high)) for c in nothing)
        lines.append(
            f"- The other {len(nothing)} of {len(comparisons)}: p is above {100 * LEVEL:g} % even alone. No effect can "
            f"be claimed. Nor can its absence: the intervals reach up to {widest:.1f} points from 0."
        )
    return "\n".join(lines) or "All comparisons are significant."


def _limits(study: Study) -> str:
    return (
        "One share rate, one number of experts and one size of model, none of them tuned for any arm; learning rates "
        f"suit the {DENSE.name} model. Tiny models, small data, {study.seeds} seeds: another data set, a larger model "
        "or a longer training may answer otherwise. The digits' test sets of different seeds overlap: intervals are of "
        "training on these 1,797 images, not of digits at large. Naive MoE keeps all its experts when it is tested: as "
        "many parameters as in training, and no folding."
    )
