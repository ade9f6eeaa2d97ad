"""One timer for all benchmarks: variants take turns in one run, so that whatever slows the machine slows all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call."""

    median: float
    p20: float
    p80: float


def seconds_on_host(function: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def seconds_on_cuda(function: Callable[[], object]) -> float:
    """How long a call's work takes on the GPU, whose L2 cache holds other data before."""
    torch.empty(2**28, dtype=torch.int8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    measure: Callable[[Callable[[], object]], float] = seconds_on_host,
) -> dict[str, Timing]:
    """Calls every variant once per round, after two rounds of warm-up that do not count."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(-2, rounds):
        for name, variant in variants.items():
            elapsed = measure(variant)
            if i >= 0:
                samples[name].append(elapsed * 1e3)
    return {name: _timing(times) for name, times in samples.items()}


def _timing(times: list[float]) -> Timing:
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), fifths[0], fifths[-1])
