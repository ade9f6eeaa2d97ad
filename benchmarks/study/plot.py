"""A panel for each task and start: every comparison with its interval and the differences that it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.study.models import DENSE
from benchmarks.study.statistics import POOLED, Comparison, accuracies
from benchmarks.study.train import Result, Run

BETTER, WORSE, UNDECIDED = "#0072b2", "#d55e00", "#777777"


def draw(results: Mapping[Run, Result], comparisons: Sequence[Comparison], title: str, path: Path) -> None:
    """One row for a task, one column for a start; one axis for the panels of a row. The pooled ones are in study.md."""
    tasks = list(dict.fromkeys(c.task for c in comparisons if c.task != POOLED))
    starts = list(dict.fromkeys(c.start for c in comparisons if c.start != POOLED))
    figure = Figure(figsize=(13, 1.2 + 6 * len(tasks)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tasks), len(starts), squeeze=False, sharex="row", sharey=True)
    for row, task in zip(panels, tasks, strict=True):
        for axes, start in zip(row, starts, strict=True):
            chosen = [c for c in comparisons if (c.task, c.start) == (task, start)]
            dense = np.mean(list(accuracies(results, task, start, DENSE.name).values()))
            _panel(axes, chosen, f"{task}, {start} (dense: {dense:.1f} %)")
    for axes in panels[-1]:
        axes.set_xlabel("difference in test accuracy, points")
    figure.suptitle(
        f"{title}\nLarge dots: means, with 95 % intervals of each comparison alone; small dots: seeds. "
        "Blue, orange: better, worse after Holm's correction; grey: no claim."
    )
    figure.savefig(path)


def _panel(axes: Axes, comparisons: Sequence[Comparison], title: str) -> None:
    for y, c in enumerate(comparisons):
        color = UNDECIDED if not c.is_significant else BETTER if c.mean > 0 else WORSE
        axes.plot(c.differences, [y + 0.25] * len(c.differences), "o", color=color, markersize=2.5, alpha=0.5)
        error = [[c.mean - c.low], [c.high - c.mean]]
        axes.errorbar(c.mean, y, xerr=error, fmt="o", color=color, capsize=3, markersize=7)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(comparisons)), [f"{c.arm} − {c.baseline}" for c in comparisons])
    axes.set_ylim(len(comparisons) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left")
