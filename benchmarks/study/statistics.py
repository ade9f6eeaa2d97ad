"""Paired differences between arms, with intervals, what is left of their significance, and what follows from it.

Which arms are compared, and how the recommended share rate is decided, was fixed before any result was looked at.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from scipy import stats

from benchmarks.study.models import (
    ALL_LAYERS,
    CONSTANT_RATES,
    DENSE,
    FEWER_EXPERTS,
    LAST_LAYERS,
    LINEAR_RATE,
    MIDDLE_RATE,
    MORE_EXPERTS,
    NO_AVERAGING,
    RIVALS,
)
from benchmarks.study.train import FINE_TUNED, SCRATCH, Result, Run

LEVEL = 0.05
POOLED = "pooled"
# Of arms and their baselines; one family for each task and start.
PAIRS = [
    *((arm.name, DENSE.name) for arm in (NO_AVERAGING, *CONSTANT_RATES, LINEAR_RATE)),
    *((arm.name, MIDDLE_RATE.name) for arm in (FEWER_EXPERTS, MORE_EXPERTS, ALL_LAYERS, LAST_LAYERS)),
    *((arm.name, DENSE.name) for arm in RIVALS),
]
# One more family: of each seed, the mean of its differences over all tasks and starts.
POOLED_PAIRS = [(arm.name, LINEAR_RATE.name) for arm in CONSTANT_RATES]
RULE = (
    f'The recommended share rate changes from "{LINEAR_RATE.name}" to the constant rate with the largest pooled mean '
    "difference only if that difference is positive and significant after Holm's correction in the pooled family; "
    "otherwise it stays."
)


@dataclass(frozen=True)
class Comparison:
    """Accuracy of `arm` less that of `baseline`, in points.

    Attributes:
        task, start: both POOLED if the differences are means over all of them.
        differences: of each seed.
        low, high: 95 % interval of the mean by Student's t, of this comparison alone.
        p: of the paired t-test.
        holm: p corrected for all comparisons of its family.
        family_size: their number.
    """

    task: str
    start: str
    arm: str
    baseline: str
    differences: tuple[float, ...]
    mean: float
    low: float
    high: float
    p: float
    holm: float
    family_size: int

    @property
    def is_significant(self) -> bool:
        return self.holm < LEVEL

    @property
    def is_suggestive(self) -> bool:
        """Significant only if it had been the one question asked."""
        return self.p < LEVEL <= self.holm


def compare(results: Mapping[Run, Result]) -> list[Comparison]:
    """Every pair of PAIRS in every task and start, over the seeds that both arms have, then the pooled family.

    Raises:
        ValueError: they have less than two in common.
    """
    found = []
    for cell in cells(results):
        found += _family([(*cell, *pair, _differences(results, [cell], *pair)) for pair in PAIRS])
    pooled = [(POOLED, POOLED, *pair, _differences(results, cells(results), *pair)) for pair in POOLED_PAIRS]
    return found + _family(pooled)


def cells(results: Mapping[Run, Result]) -> list[tuple[str, str]]:
    """Tasks and starts."""
    tasks = dict.fromkeys(run.task for run in results)
    return [(task, start) for task in tasks for start in (SCRATCH, FINE_TUNED)]


def _family(cases: Sequence[tuple[str, str, str, str, tuple[float, ...]]]) -> list[Comparison]:
    alone = [Comparison(*case, *estimate(case[-1]), 1.0, len(cases)) for case in cases]
    return [replace(c, holm=adjusted) for c, adjusted in zip(alone, holm([c.p for c in alone]), strict=True)]


def _differences(
    results: Mapping[Run, Result], where: Sequence[tuple[str, str]], arm: str, baseline: str
) -> tuple[float, ...]:
    """Of each seed that both arms have everywhere, the mean."""
    pairs = [(accuracies(results, *cell, arm), accuracies(results, *cell, baseline)) for cell in where]
    seeds = sorted(set.intersection(*(a.keys() & b.keys() for a, b in pairs)))
    if len(seeds) < 2:
        place = ", ".join(where[0]) if len(where) == 1 else POOLED
        raise ValueError(f"{arm} and {baseline} must have two seeds in common ({place}), got {len(seeds)}")
    return tuple(statistics.fmean(a[seed] - b[seed] for a, b in pairs) for seed in seeds)


def of_arm(results: Mapping[Run, Result], task: str, start: str, arm: str) -> dict[int, Result]:
    """Of each seed."""
    return {run.seed: result for run, result in results.items() if run[:3] == (task, start, arm)}


def accuracies(results: Mapping[Run, Result], task: str, start: str, arm: str) -> dict[int, float]:
    """Of each seed."""
    return {seed: result.accuracy for seed, result in of_arm(results, task, start, arm).items()}


def estimate(differences: Sequence[float]) -> tuple[float, float, float, float]:
    """Mean, its 95 % interval, and p; differences that are all alike estimate no spread, and show nothing: p = 1."""
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    if error == 0:
        return mean, mean, mean, 1.0
    low, high = stats.t.interval(1 - LEVEL, len(differences) - 1, loc=mean, scale=error)
    return mean, float(low), float(high), float(stats.ttest_1samp(differences, 0).pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction: the i-th smallest of m times m − i, and never less than a smaller one gives."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def decide(comparisons: Sequence[Comparison]) -> tuple[str, Comparison]:
    """RULE: the arm with the recommended share rate, and the comparison that decides."""
    best = max((c for c in comparisons if c.task == POOLED), key=lambda c: c.mean)
    return (best.arm if best.is_significant and best.mean > 0 else best.baseline), best
