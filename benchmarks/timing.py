"""One timer for all benchmarks: variants take turns in one run, so that whatever slows the machine slows all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call."""

    median: float
    p20: float
    p80: float


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Calls every variant once per round, after two rounds of warm-up that do not count."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(-2, rounds):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant()
            elapsed = time.perf_counter() - start
            if i >= 0:
                samples[name].append(elapsed * 1e3)
    return {name: _timing(times) for name, times in samples.items()}


def _timing(times: list[float]) -> Timing:
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), fifths[0], fifths[-1])
