"""What the demo shows: progress, a table, a verdict, a plot."""

from __future__ import annotations

import functools
import io
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from scipy import stats

from .training import Options, Pair, Result

DENSE, EXPERTS, THEORY = "#0072b2", "#d55e00", "#222222"
SMALL_FACTOR = 0.01  # below it a relative deviation would only show float32 rounding


# --- the console ---


def make_console() -> Console:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # β in a terminal that has no Greek; stderr never fails
    return Console(highlight=False, markup=False)


def make_progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:7}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps, loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
    )


def add_bar(progress: Progress, name: str, total: int) -> Callable[..., None]:
    """A bar; what is returned moves it on by one step, of the loss that is given by its name."""
    bar = progress.add_task(name, total=total, loss=float("nan"))
    return functools.partial(progress.update, bar, advance=1)


def show(console: Console, options: Options, pairs: Sequence[Pair]) -> None:
    deviation = "mean ± SD" if len(pairs) > 1 else "one seed"
    table = Table(title=f"digits: {_data(options)}", title_justify="left")
    table.add_column("ViT")
    headers = (f"test accuracy, %\n{deviation}", "parameters\nwhile training", "parameters\nafter", "seconds\nper seed")
    for header in headers:
        table.add_column(header, justify="right")
    for name in ("dense", "experts", "folded"):
        results: list[Result] = [getattr(pair, name) for pair in pairs]
        accuracies = [result.accuracy for result in results]
        accuracy = f"{statistics.fmean(accuracies):.2f}"
        table.add_row(
            "experts in eval" if name == "experts" else name,
            f"{accuracy} ± {statistics.stdev(accuracies):.2f}" if len(pairs) > 1 else accuracy,
            f"{results[0].parameters_training:,}",
            f"{results[0].parameters_after:,}",
            f"{statistics.fmean(result.seconds for result in results):.2f}",
        )
    console.print(table)
    console.print(verdict([pair.experts.accuracy - pair.dense.accuracy for pair in pairs]))
    console.print(agreement(options, pairs))
    console.print("loaded folded weights into an untouched ViT with strict=True: outputs equal", soft_wrap=True)


def _data(options: Options) -> str:
    return f"{options.train_images} training images, {options.seeds} seed{'s' if options.seeds > 1 else ''}"


def verdict(differences: Sequence[float]) -> str:
    """What paired differences in accuracy, in points, allow one to say."""
    n, mean = len(differences), statistics.fmean(differences)
    measured = f"Experts minus dense: {mean:+.2f} points"
    if n == 1:
        return f"{measured}, from 1 seed. One seed gives no interval: no effect can be claimed."
    error = statistics.stdev(differences) / n**0.5
    if error == 0:
        return f"{measured} in each of {n} seeds. No interval can be estimated from that: no effect can be claimed."
    low, high = stats.t.interval(0.95, n - 1, loc=mean, scale=error)
    measured += f", 95 % interval {low:+.2f} to {high:+.2f}, over {n} paired seeds."
    if low <= 0 <= high:
        return f"{measured} This includes 0: no effect can be claimed from {n} seeds."
    return f"{measured} This does not include 0, with {n} seeds on one small data set: it says nothing of others."


def agreement(options: Options, pairs: Sequence[Pair]) -> str:
    """How far the measured contractions, of each tensor, are from |1 − βE/(E−1)|."""
    relative, absolute = [], []
    for contraction in itertools.chain.from_iterable(pair.contractions for pair in pairs):
        theory = options.contraction(contraction.beta)
        factors = [b / a for a, b in zip(contraction.before, contraction.after, strict=True) if a > 0]
        if theory < SMALL_FACTOR:
            absolute += [abs(factor - theory) for factor in factors]
        else:
            relative += [abs(factor - theory) / theory for factor in factors]
    found = []
    if relative:
        found.append(f"{max(relative):.1e} is the largest relative deviation of {len(relative):,} measurements")
    if absolute:
        where = f"where the factor is below {SMALL_FACTOR}"
        found.append(f"{max(absolute):.1e} the largest absolute one of {len(absolute):,} {where}")
    return f"Expert spread after ÷ before averaging, against |1 − βE/(E−1)|: {', '.join(found) or 'no spread'}."


# --- plot ---


def save_plot(options: Options, pairs: Sequence[Pair]) -> None:
    """Training loss, expert spread over the steps, and what each averaging left of the spread."""
    figure = Figure(figsize=(13, 5.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, 3)
    _plot_losses(panels[0], pairs)
    _plot_spread(panels[1], options, pairs)
    _plot_factors(panels[2], options, pairs)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
    beta = "β =" if options.schedule == "constant" else f"{options.schedule} β: 0 →"
    figure.suptitle(
        f"ViT on digits: {_data(options)}, {options.experts} experts, {beta} {options.share_rate:g}\n",
        fontsize="x-large",
    )
    start = "start as copies, which the first step parts" if options.init == "copy" else "start apart, independent"
    figure.supxlabel(
        f"\nThe experts {start}. Dashed in the middle: their first measured spread, had averaging alone acted on it.\n"
        "Where the measured spread leaves that line, the gradients draw the experts apart."
        + (" Lines: mean over seeds; bands: their range." if len(pairs) > 1 else ""),
        fontsize="medium",
    )
    figure.savefig(options.output)


def overall(spreads: Sequence[float]) -> float:
    """Root mean square over tensors, big and small alike."""
    return math.sqrt(statistics.fmean(spread**2 for spread in spreads))


def _plot_losses(axes: Axes, pairs: Sequence[Pair]) -> None:
    for name, color in (("dense", DENSE), ("experts", EXPERTS)):
        losses = np.array([getattr(pair, name).losses for pair in pairs])  # [seeds, epochs]
        _line_and_band(axes, np.arange(1, losses.shape[1] + 1), losses, color, name)
    axes.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy, nats", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _plot_spread(axes: Axes, options: Options, pairs: Sequence[Pair]) -> None:
    steps = [c.step for c in pairs[0].contractions]
    # Before averaging: after it there may be no spread at all, which has no place on a logarithmic axis.
    spreads = np.array([[overall(c.before) for c in pair.contractions] for pair in pairs])  # [seeds, measurements]
    _line_and_band(axes, steps, spreads, EXPERTS, "measured, before averaging")
    alone = spreads[:, 0].mean() * np.cumprod([1, *_theory(options)[:-1]])
    axes.plot(alone, color=THEORY, linestyle="--", label="contraction by β alone")
    axes.set(
        title="Spread of the experts",
        xlabel="step",
        ylabel="RMS distance from the mean expert",
        yscale="log",
        ylim=(spreads.min() / 3, spreads.max() * 3),
    )


def _plot_factors(axes: Axes, options: Options, pairs: Sequence[Pair]) -> None:
    for i, pair in enumerate(pairs):
        measured = [(c.step, overall(c.after) / overall(c.before)) for c in pair.contractions if any(c.before)]
        label = "measured" if i == 0 else None
        axes.plot(*np.array(measured).reshape(-1, 2).T, "o", color=EXPERTS, markersize=4, alpha=0.6, label=label)
    axes.plot(_theory(options), color=THEORY, linestyle="--", label="theory, |1 − βE/(E−1)|")
    axes.set(
        title="What one averaging leaves of the spread",
        xlabel="step",
        ylabel="spread after ÷ before",
        ylim=(-0.03, 1.05),
    )


def _theory(options: Options) -> list[float]:
    """What each averaging should leave of the spread."""
    schedule = options.make_schedule()
    return [options.contraction(schedule(step)) for step in range(options.num_steps)]


def _line_and_band(axes: Axes, x: Any, ys: NDArray[np.float64], color: str, label: str) -> None:
    """Mean and range over seeds; ys: `[seeds, len(x)]`."""
    axes.plot(x, ys.mean(axis=0), color=color, marker=".", label=label)
    if len(ys) > 1:
        axes.fill_between(x, ys.min(axis=0), ys.max(axis=0), color=color, alpha=0.2, linewidth=0)
