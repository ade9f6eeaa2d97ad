"""`python -m benchmarks.pictures`: the pictures of docs/, of the method and from the committed results.

`make bench` and `python -m benchmarks.saved` make the results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from benchmarks.plot import growth
from benchmarks.report import RESULTS, ROOT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGES = ROOT / "docs" / "images"
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")
DEAL = (2, 0, 3, 1, 0, 2, 1, 3)  # the expert of each of eight tokens


def method() -> None:
    """Train, average, fold: a panel each."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for ax, title in zip(axes, ("Train: tokens are dealt at random", "Average after each step", "Fold"), strict=True):
        ax.set(xlim=(0, 8), ylim=(0, 6), title=title)
        ax.axis("off")
    train, average, fold = axes
    for e, colour in enumerate(COLOURS):
        _box(train, 2 * e + 0.15, 2.5, 1.7, f"expert {e + 1}", colour)
    for t, e in enumerate(DEAL):
        for y in (5.1, 0.2):
            _box(train, t + 0.1, y, 0.8, "", COLOURS[e], height=0.6)
        _arrow(train, (t + 0.5, 5.1), (2 * e + 1, 3.55), COLOURS[e])
        _arrow(train, (2 * e + 1, 2.5), (t + 0.5, 0.85), COLOURS[e])
    train.text(4, 5.8, "tokens of the batch: the same number for each expert", ha="center")
    places = ((1.3, 4.6), (6.6, 4.9), (1.6, 0.9), (6.9, 1.2))
    mean = sum(x for x, _ in places) / 4, sum(y for _, y in places) / 4
    for place, colour in zip(places, COLOURS, strict=True):
        average.plot(*place, "o", color=colour, markersize=14)
        pulled = 0.55 * place[0] + 0.45 * mean[0], 0.55 * place[1] + 0.45 * mean[1]
        _arrow(average, place, pulled, colour)
    average.plot(*mean, "k*", markersize=16)
    average.text(mean[0], mean[1] - 0.3, "mean: stays where it is", ha="center", va="top")
    average.text(4, 0.05, "weights of the experts, pulled by the share rate β", ha="center")
    for e, colour in enumerate(COLOURS):
        _box(fold, 0.2, 4.6 - 1.3 * e, 1.9, f"expert {e + 1}", colour)
        _arrow(fold, (2.15, 5.1 - 1.3 * e), (4.4, 3.2), colour)
    _box(fold, 4.5, 2.65, 3.2, "one FFN: the mean", "0.75")
    fold.text(6.1, 1.9, "the architecture and the cost\nof the model before", ha="center", va="top")
    _save(figure, "method")


def saved() -> None:
    """Bytes and time by what is kept for backward, of ViT-B in bfloat16."""
    rows = json.loads((RESULTS / "saved-amd-epyc.json").read_text())["results"]["ViT-B, bf16"]
    names = [r["name"] for r in rows]
    colours = ["tab:blue" if name.startswith("saved=") else "0.6" for name in names]
    figure, axes = plt.subplots(1, 2, figsize=(13, 4), layout="constrained", sharey=True)
    for ax, key, label in zip(
        axes, ("bytes a token", "ms"), ("bytes a token", "forward and backward, ms"), strict=True
    ):
        bars = ax.barh(names, [r[key] for r in rows], color=colours)
        ax.bar_label(bars, [f"{r[key]:,.0f}" for r in rows], padding=3)
        ax.set(xlabel=label)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle("ViT-B, bfloat16: what is kept for backward")
    _save(figure, "saved")


def scaling() -> None:
    run = json.loads((RESULTS / "amd-epyc.json").read_text())
    figure, ax = plt.subplots(figsize=(6.5, 4), layout="constrained")
    growth(run, ax)
    ax.spines[["top", "right"]].set_visible(False)
    _save(figure, "growth")


def _box(ax: Axes, x: float, y: float, width: float, text: str, colour: str, height: float = 1.0) -> None:
    style = "round,pad=0,rounding_size=0.15"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor="none", alpha=0.75))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center")


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=colour, shrinkA=4, shrinkB=2))


def _save(figure: Any, name: str) -> None:
    path: Path = IMAGES / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    method()
    saved()
    scaling()
