"""Paired differences between arms, with intervals, and what is left of their significance when there are many."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from benchmarks.study.models import ARMS, DENSE, NAIVE, NAIVE_EWA, RANDOM, RANDOM_EWA
from benchmarks.study.train import FINE_TUNED, SCRATCH, Result, Run

LEVEL = 0.05
PAIRS = [(arm, DENSE.name) for arm in ARMS if arm != DENSE.name]
PAIRS += [(NAIVE_EWA.name, NAIVE.name), (RANDOM_EWA.name, RANDOM.name)]


@dataclass(frozen=True)
class Comparison:
    """Accuracy of `arm` less that of `baseline`, in points.

    Attributes:
        differences: of each seed.
        low, high: 95 % interval of the mean by Student's t, of this comparison alone.
        p: of the paired t-test.
        holm: p corrected for all comparisons of the study.
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

    @property
    def is_significant(self) -> bool:
        return self.holm < LEVEL

    @property
    def is_suggestive(self) -> bool:
        """Significant only if it had been the one question asked."""
        return self.p < LEVEL <= self.holm


def compare(results: Mapping[Run, Result]) -> list[Comparison]:
    """Every pair of PAIRS in every task and start, over the seeds that both arms have.

    Raises:
        ValueError: they have less than two in common.
    """
    cells = dict.fromkeys((run.task, run.start) for run in results if run.start in (SCRATCH, FINE_TUNED))
    cases = [(task, start, arm, baseline) for task, start in cells for arm, baseline in PAIRS]
    differences = [_differences(results, *case) for case in cases]
    estimates = [estimate(values) for values in differences]
    corrected = holm([p for *_, p in estimates])
    return [
        Comparison(*case, tuple(values), *numbers, adjusted)
        for case, values, numbers, adjusted in zip(cases, differences, estimates, corrected, strict=True)
    ]


def _differences(results: Mapping[Run, Result], task: str, start: str, arm: str, baseline: str) -> list[float]:
    of_arm, of_baseline = accuracies(results, task, start, arm), accuracies(results, task, start, baseline)
    seeds = sorted(of_arm.keys() & of_baseline.keys())
    if len(seeds) < 2:
        raise ValueError(f"{arm} and {baseline} must have two seeds in common ({task}, {start}), got {len(seeds)}")
    return [of_arm[seed] - of_baseline[seed] for seed in seeds]


def accuracies(results: Mapping[Run, Result], task: str, start: str, arm: str) -> dict[int, float]:
    """Of each seed."""
    return {run.seed: result.accuracy for run, result in results.items() if run[:3] == (task, start, arm)}


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
