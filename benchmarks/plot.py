"""Bars of what each variant takes, beside the JSON of the same run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def bars(results: Sequence[dict[str, object]], title: str, path: Path) -> None:
    """One panel per operation, in milliseconds; the line of each bar goes from p20 to p80."""
    operations = list(dict.fromkeys(str(r["operation"]) for r in results))
    rows = [[r for r in results if r["operation"] == operation] for operation in operations]
    heights = [len(r) for r in rows]
    figure, axes = plt.subplots(
        len(rows), 1, figsize=(8, 1.2 + 0.42 * sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for ax, operation, group in zip(axes[:, 0], operations, rows, strict=True):
        names = [str(r["variant"]) for r in group]
        low, median, high = ([float(str(r[key])) for r in group] for key in ("p20", "median", "p80"))
        spread = [
            [m - a for m, a in zip(median, low, strict=True)],
            [b - m for m, b in zip(median, high, strict=True)],
        ]
        ours = ["tab:blue" if "one pass" in name else "lightgrey" for name in names]
        drawn = ax.barh(names, median, xerr=spread, color=ours, ecolor="black", capsize=2)
        ax.bar_label(drawn, [f" {m:.1f}" for m in median], padding=3)
        ax.set_xlim(0, 1.15 * max(high))
        ax.invert_yaxis()
        ax.set_title(f"{operation}: {group[0]['case']}", loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("milliseconds (median, 20th to 80th percentile)")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
