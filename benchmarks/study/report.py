"""What a study found, as JSON and in words that claim no more."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.study.models import DENSE, LINEAR_RATE, MIDDLE_RATE
from benchmarks.study.statistics import LEVEL, POOLED, RULE, Comparison, cells, decide, of_arm
from benchmarks.study.train import NUM_FOLLOWED, NUM_POINTS, Result, Run, Study, course_steps, steps_of


def as_json(
    study: Study, environment: Mapping[str, object], results: Mapping[Run, Result], comparisons: Sequence[Comparison]
) -> dict[str, Any]:
    return {
        "environment": environment,
        "study": asdict(study),
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "recommended": decide(comparisons)[0],
        "runs": [{**run._asdict(), **result._asdict()} for run, result in sorted(results.items())],
    }


def as_text(
    study: Study, environment: Mapping[str, object], results: Mapping[Run, Result], comparisons: Sequence[Comparison]
) -> str:
    """In Markdown."""
    seconds = sum(result.seconds for result in results.values())
    cpu = sum(result.cpu_seconds for result in results.values())
    pooled = [c for c in comparisons if c.task == POOLED]
    parts = [
        "# Does averaging help where the dense model overfits?",
        f"Made by `python -m benchmarks.study` at commit {environment['commit']}: {environment['device']}, PyTorch "
        f"{torch.__version__}. {len(results)} trainings took {seconds:,.0f} seconds together, {cpu:,.0f} of a CPU.",
        _setting(study),
        "## Accuracy on the test set, %",
        _arm_table(study, results, lambda result: result.accuracy),
        "Mean ± standard deviation over seeds. Arms share splits, so that their differences vary less.",
        "## Loss on the test set",
        _arm_table(study, results, lambda result: result.test_loss),
        "Shown for its own sake: accuracy is what was fixed to be compared.",
        "## Differences",
        _difference_table(comparisons),
        f"Points of accuracy, paired by seed; 95 % intervals of each comparison alone, by Student's t. Holm: p of the "
        f"paired t-test, corrected for the {comparisons[0].family_size} comparisons of its task and start, or the "
        f"{pooled[0].family_size} pooled ones. Pooled: of each seed, the mean over all tasks and starts.",
        "## What is significant",
        _significant(comparisons),
        "## What is not",
        _not_significant(comparisons),
        "## Does the dense model overfit?",
        _overfitting_table(study, results),
        f"Means over seeds. Loss on the first {NUM_FOLLOWED} test examples, looked at {NUM_POINTS} times; its "
        "lowest is of each seed alone, and so is the step, of which the median is shown.",
        "## The recommended share rate",
        _decision(comparisons),
        "## What this cannot say",
        _limits(study),
    ]
    return "\n\n".join(parts) + "\n"


def _setting(study: Study) -> str:
    tasks = "; ".join(
        f"{task.name}: {task.num_training:,} examples for training and {task.num_test:,} for testing, "
        f"width {task.d_model}, {task.depth} blocks, {task.num_steps} steps of {task.batch_size} from scratch and "
        f"{task.num_fine_tuning_steps} of fine-tuning"
        for task in study.tasks
    )
    return (
        f"{tasks}. {study.seeds} seeds, each with its own split, weights and batches, which all arms share.\n\n"
        "- **Random partition**: all arms that name β, E or FFNs, and no averaging. Every other FFN becomes E = 4 "
        "experts, if not said otherwise; tested folded, at the cost of the dense model.\n"
        f"- **β**: the share rate, after each step; in {LINEAR_RATE.name} it rises linearly to 0.3 at the "
        f"end. What varies E or the layers has {MIDDLE_RATE.name}, and is compared with the arm of that name.\n"
        "- **ExFusion** (arXiv 2603.27965), by its abstract: every other FFN's weights are a learned mixture (softmax) "
        "of four experts', made before each forward. How experts start and mixtures are normalised is our choice.\n"
        "- **Weight EMA**: of the dense model's training; its memory is a tenth of the steps. **Stochastic depth**: "
        "0.1 in the last block, less in those before. **Dropout**: 0.1, twice in each FFN.\n"
        "- **From scratch**: experts start apart.\n"
        "- **Fine-tuned**: all arms, the dense one too, start from one dense model, trained on other examples of an "
        "altered task (MNIST under noise, solids whole and without noise); experts start as copies, ExFusion's with "
        "noise.\n"
        "- Solids: point clouds of ten kinds, stretched, turned about the vertical and tilted at random, noised, cut "
        "off on one side."
    )


def _arm_table(study: Study, results: Mapping[Run, Result], value: Callable[[Result], float]) -> str:
    rows = [["", *(f"{task}, {start}" for task, start in cells(results))]]
    for arm in study.arms:
        values = [[*map(value, of_arm(results, *cell, arm.name).values())] for cell in cells(results)]
        rows.append([arm.name, *(f"{statistics.fmean(v):.2f} ± {statistics.stdev(v):.2f}" for v in values)])
    return _table(rows)


def _difference_table(comparisons: Sequence[Comparison]) -> str:
    rows = [["task", "start", "comparison", "difference", "95 % interval", "p", "Holm", ""]]
    for c in comparisons:
        mark = "significant" if c.is_significant else "alone only" if c.is_suggestive else ""
        interval = f"{_signed(c.low)} to {_signed(c.high)}"
        name = f"{c.arm} − {c.baseline}"
        start = "" if c.start == POOLED else c.start
        rows.append([c.task, start, name, _signed(c.mean), interval, f"{c.p:.2g}", f"{c.holm:.2g}", mark])
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
    place = POOLED if c.task == POOLED else f"{c.task}, {c.start}"
    interval = f"95 % interval {_signed(c.low)} to {_signed(c.high)}"
    return f"{place}: {c.arm} is {word} than {c.baseline} by {abs(c.mean):.2f} points, {interval}"


def _not_significant(comparisons: Sequence[Comparison]) -> str:
    suggestive = [c for c in comparisons if c.is_suggestive]
    nothing = [c for c in comparisons if not (c.is_significant or c.is_suggestive)]
    lines = [
        f"- {_sentence(c)}: p = {c.p:.2g} alone, but {c.holm:.2g} as one of {c.family_size} comparisons. No claim."
        for c in suggestive
    ]
    for place in dict.fromkeys((c.task, c.start) for c in nothing):
        of_place = [c for c in nothing if (c.task, c.start) == place]
        widest = max(max(abs(c.low), abs(c.high)) for c in of_place)
        name = POOLED if place[0] == POOLED else ", ".join(place)
        lines.append(
            f"- {name}: of {of_place[0].family_size} comparisons {len(of_place)} have p above {100 * LEVEL:g} % even "
            f"alone. No effect can be claimed. Nor can its absence: the intervals reach up to {widest:.1f} points from "
            "0."
        )
    return "\n".join(lines) or "All comparisons are significant."


def _overfitting_table(study: Study, results: Mapping[Run, Result]) -> str:
    rows = [["", "training accuracy, %", "step of the lowest test loss", "lowest", "at the end"]]
    for task, start in cells(results):
        of_dense = [*of_arm(results, task, start, DENSE.name).values()]
        num_steps = steps_of(study.task(task), start)
        lowest = statistics.median_low(
            course_steps(num_steps)[result.course.index(min(result.course))] for result in of_dense
        )
        rows.append(
            [
                f"{task}, {start}",
                f"{statistics.fmean(result.training_accuracy for result in of_dense):.1f}",
                f"{lowest} of {num_steps}",
                f"{statistics.fmean(min(result.course) for result in of_dense):.3f}",
                f"{statistics.fmean(result.course[-1] for result in of_dense):.3f}",
            ]
        )
    return _table(rows)


def _decision(comparisons: Sequence[Comparison]) -> str:
    recommended, best = decide(comparisons)
    found = (
        f"{best.arm} has the largest pooled difference to {best.baseline}: {_signed(best.mean)} points, 95 % interval "
        f"{_signed(best.low)} to {_signed(best.high)}, corrected p = {best.holm:.2g}."
    )
    verdict = (
        f"It stays {recommended}." if recommended == best.baseline else f"It changes: {recommended} is recommended."
    )
    return f"The rule, fixed before the results: {RULE}\n\n{found} **{verdict}**"


def _limits(study: Study) -> str:
    names = " and ".join(task.name for task in study.tasks)
    return (
        f"One size of model for each task, tiny ones, and small data, {names}, {study.seeds} seeds. Another "
        "data set or a larger model may answer otherwise. Learning rates suit the dense model; no arm's own options "
        "were tuned. MNIST's test sets of different seeds overlap: intervals are of training on these 5,000 images, "
        "not of MNIST at large. Behind Adam, whose steps do not depend on a gradient's scale, ExFusion's experts move "
        "alike while their weights are equal: from copies it trains nearly as the dense model does. Routed experts are "
        "not studied here."
    )
