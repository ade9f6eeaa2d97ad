"""Pictures of a run, beside its JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import peers
from benchmarks.report import measured_cases

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS_COLOUR = "tab:blue"
Run = dict[str, Any]
Panel = Callable[[Run, "Axes"], None]


def draw(run: Run, path: Path) -> list[Path]:
    """`<path>.png`: throughput, memory, growth with T and a roofline; `<path>-step.png`: the passes over parameters
    and the training step. Only what the run has. Returns the files written."""
    where = run["environment"]
    title = f"{where['device']}, PyTorch {where['versions']['torch']}, commit {where['commit']}"
    written = []
    panels: list[Panel] = []
    if any("why_not" not in r for r in run.get("layer", ())):
        panels += [throughput, memory, roofline]
    if any("why_not" not in r for r in run.get("growth", ())):
        panels.append(growth)
    if panels:
        written.append(_figure(panels, run, title, path.with_name(f"{path.name}.png")))
    rows = [r for r in (*run.get("experts", ()), *run.get("training_step", ())) if "why_not" not in r]
    if rows:
        written.append(bars(rows, title, path.with_name(f"{path.name}-step.png")))
    return written


def _figure(panels: list[Panel], run: Run, title: str, path: Path) -> Path:
    figure, axes = plt.subplots(2, 2, figsize=(16, 11), layout="constrained")
    for ax, panel in zip(axes.flat, panels, strict=False):
        panel(run, ax)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _names(run: Run) -> list[str]:
    """Peers that were measured anywhere."""
    return list(dict.fromkeys(r["peer"] for r in run["layer"] if "why_not" not in r))


def _colours(names: list[str]) -> dict[str, Any]:
    palette = matplotlib.colormaps["tab20"]
    return {name: OURS_COLOUR if name == peers.OURS else palette(2 + i) for i, name in enumerate(names)}


def _grouped(run: Run, ax: Axes, value: Callable[[Run], float]) -> None:
    """A group of bars for each case, a bar for each peer."""
    groups, names = measured_cases(run), _names(run)
    width = 0.85 / len(names)
    for i, name in enumerate(names):
        places, heights = [], []
        for j, group in enumerate(groups.values()):
            for r in group:
                if r["peer"] == name and "why_not" not in r:
                    places.append(j + i * width)
                    heights.append(value(r))
        ax.bar(places, heights, width, label=name, color=_colours(names)[name])
    labels = [textwrap.fill(f"{case}, {dtype}", 14) for case, dtype in groups]
    ax.set_xticks([j + 0.4 for j in range(len(groups))], labels, fontsize=7)


def _unit(run: Run) -> tuple[float, str]:
    """What to divide TFLOP/s by, and the name of that."""
    largest = max(r["both"]["tflops"] for r in run["layer"] if "why_not" not in r)
    return (1, "TFLOP/s") if largest >= 1 else (1e-3, "GFLOP/s")


def _legend(ax: Axes) -> None:
    """Below, where it hides no bar."""
    ax.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)


def throughput(run: Run, ax: Axes) -> None:
    unit, name = _unit(run)
    _grouped(run, ax, lambda r: r["both"]["tflops"] / unit)
    for j, group in enumerate(measured_cases(run).values()):
        result = next(r["both"] for r in group if "why_not" not in r)
        best = result["tflops"] / result["of_floor"] / unit
        ax.hlines(best, j - 0.05, j + 0.85, color="black", linestyles="dashed", label="_again" if j else "floor")
    _legend(ax)
    ax.set_ylabel(name)
    ax.set_title("Forward and backward: throughput, and the floor of this device (dashed)", loc="left", fontsize=10)


def memory(run: Run, ax: Axes) -> None:
    _grouped(run, ax, lambda r: r["peak_bytes"] / 2**20)
    _legend(ax)
    ax.set_ylabel("MiB")
    ax.set_yscale("log")
    ax.set_title("Peak memory of forward and backward, gradients included", loc="left", fontsize=10)


def growth(run: Run, ax: Axes) -> None:
    names = list(dict.fromkeys(r["peer"] for r in run["growth"] if "why_not" not in r))
    for name in names:
        taken = [r for r in run["growth"] if r["peer"] == name and "why_not" not in r]
        tokens = [r["num_tokens"] for r in taken]
        ax.plot(tokens, [r["median"] for r in taken], "o-", label=name, color=_colours(names)[name])
        if name == peers.OURS:
            per_token = taken[-1]["median"] / tokens[-1]
            ax.plot(tokens, [per_token * t for t in tokens], "k:", label="proportional to T")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xlabel("T, tokens")
    ax.set_ylabel("ms, forward and backward")
    ax.legend(fontsize=8)
    ax.set_title(f"Time against T, up to {run['growth'][-1]['sizes']}", loc="left", fontsize=10)


def roofline(run: Run, ax: Axes) -> None:
    """Each measured peer at its arithmetic per byte of least traffic, under the roof of this device."""
    floors, (unit, name) = run["floors"], _unit(run)
    points = [r for r in run["layer"] if "why_not" not in r]
    for dtype in dict.fromkeys(r["dtype"] for r in points):
        rate = floors["matrix_rates"][dtype]
        ridge = rate / floors["copy_rate"]
        low, high = 0.3 * min([ridge, *_intensities(points)]), 2 * max([ridge, *_intensities(points)])
        roof = [(i, min(rate, i * floors["copy_rate"]) / 1e12 / unit) for i in (low, ridge, high)]
        ax.plot(*zip(*roof, strict=True), "-", linewidth=1, label=f"roof, {dtype}")
    for peer, colour in _colours(_names(run)).items():
        own = [r for r in points if r["peer"] == peer]
        ax.scatter(_intensities(own), [r["both"]["tflops"] / unit for r in own], s=18, label=peer, color=colour)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("FLOP per byte of least traffic")
    ax.set_ylabel(name)
    ax.legend(fontsize=7)
    ax.set_title("Roofline", loc="left", fontsize=10)


def _intensities(results: list[Run]) -> list[float]:
    return [r["intensity"] for r in results]


def bars(results: list[Run], title: str, path: Path) -> Path:
    """One panel per operation or ViT, in milliseconds; the line of each bar goes from p20 to p80."""
    groups: dict[str, list[Run]] = {}
    for r in results:
        name = f"{r['operation']}: {r['case']}" if "operation" in r else f"training step: {r['case']}"
        groups.setdefault(name, []).append(r)
    heights = [len(group) for group in groups.values()]
    figure, axes = plt.subplots(
        len(groups),
        1,
        figsize=(8, 1.2 + 0.45 * sum(heights)),
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    for ax, (name, group) in zip(axes[:, 0], groups.items(), strict=True):
        names = [str(r["variant"]) for r in group]
        median = [r["median"] for r in group]
        spread = [[r["median"] - r["p20"] for r in group], [r["p80"] - r["median"] for r in group]]
        ours = [OURS_COLOUR if "one pass" in variant else "lightgrey" for variant in names]
        drawn = ax.barh(names, median, xerr=spread, color=ours, ecolor="black", capsize=2)
        ax.bar_label(drawn, [f" {m:.3g}" for m in median], padding=3)
        ax.set_xlim(0, 1.15 * max(r["p80"] for r in group))
        ax.invert_yaxis()
        ax.set_title(name, loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("milliseconds (median, 20th to 80th percentile)")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
