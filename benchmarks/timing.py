"""One timer for all benchmarks: variants take turns in one run, so that whatever slows the machine slows all."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MIN_ROUNDS, MAX_ROUNDS = 5, 41
# Twice NVIDIA's largest second cache: writing it leaves nothing of what a kernel will read.
FLUSH_BYTES = 2**28
# The GPU sleeps before a phase, while the host gets ahead of it, so that kernels are timed and not Python: at most so
# many seconds (who waits for the GPU never gets ahead), of so many cycles or fewer.
MAX_HEAD_START = 0.02
CYCLES_PER_SECOND = 2e9


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call, or a ratio."""

    median: float
    p20: float
    p80: float
    rounds: int

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 5) for name, value in asdict(self).items()}


# What a call takes, in seconds of each phase.
Sample = tuple[float, ...]
# A variant is called once a round, does its work, and tells how long each phase of it took, in seconds.
Variant = Callable[[], Sample]


class Stopwatch:
    """Times phases on a device.

    On a GPU by events, with a cold second cache, and asleep at first: as long as the host took in the call before. On a
    CPU by the clock.
    """

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda") if self.cuda else None
        self._host: dict[Callable[[], object], float] = {}

    def phase(self, function: Callable[[], object]) -> float:
        """Seconds that a call takes; what it returns is dropped."""
        if self.flush is None:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(int(CYCLES_PER_SECOND * self._host.get(function, MAX_HEAD_START)))
        before.record()
        start = time.perf_counter()
        function()
        self._host[function] = min(1.5 * (time.perf_counter() - start) + 1e-4, MAX_HEAD_START)
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3


def timed(function: Callable[[], object], watch: Stopwatch) -> Variant:
    """`function` as a variant of one phase."""
    return lambda: (watch.phase(function),)


def interleaved(
    variants: Mapping[str, Variant], seconds: float, min_rounds: int = MIN_ROUNDS, max_rounds: int = MAX_ROUNDS
) -> dict[str, list[Timing]]:
    """`rounds`, and for each variant the timing of each phase."""
    return {name: timings(taken) for name, taken in rounds(variants, seconds, min_rounds, max_rounds).items()}


def rounds(
    variants: Mapping[str, Variant], seconds: float, min_rounds: int = MIN_ROUNDS, max_rounds: int = MAX_ROUNDS
) -> dict[str, list[Sample]]:
    """Calls every variant once a round, for `seconds`, after a round of warm-up that does not count.

    Each round has an order of its own: what a variant leaves behind, in caches and in the state of malloc, would else
    always be left to the same one.

    Returns:
        for each variant a sample of each round.
    """
    names = list(variants)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for name in names:
        variants[name]()
    shuffle = random.Random(0).shuffle
    deadline = time.monotonic() + seconds
    for i in range(max_rounds):
        if i >= min_rounds and time.monotonic() > deadline:
            break
        shuffle(names)
        for name in names:
            samples[name].append(variants[name]())
    return samples


def timings(samples: Sequence[Sequence[float]]) -> list[Timing]:
    """Of each phase, from at least two samples."""
    return [_timing([1e3 * seconds for seconds in phase]) for phase in zip(*samples, strict=True)]


def ratios(samples: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]) -> list[Timing]:
    """Of each phase: what one takes ÷ what the other takes in the same round, when the machine is in the same mood."""
    phases = zip(zip(*samples, strict=True), zip(*baseline, strict=True), strict=True)
    return [_timing([a / b for a, b in zip(*phase, strict=True)]) for phase in phases]


def _timing(values: Sequence[float]) -> Timing:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), fifths[0], fifths[-1], len(values))


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """The most memory in tensors that a call holds at a time, beyond what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from ewa_kernels.kernels.reused import Reused  # which an older commit, compared with this one, has not
    from ewa_kernels.kernels.scratch import Scratch

    Scratch.clear()  # what a call takes over from the one before counts too
    Reused.clear()
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    held = peak = 0
    results = profiler.profiler.kineto_results if profiler.profiler is not None else None
    for event in [] if results is None else results.events():
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextmanager
def _silent() -> Iterator[None]:
    """Without what the profiler's C++ writes to stderr each time."""
    stderr = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def num_launches(function: Callable[[], object]) -> int:
    """Kernels that a call runs on a GPU, copies and fills not counted."""
    function()
    torch.cuda.synchronize()
    with _silent(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        function()
        torch.cuda.synchronize()
    return sum(
        event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
        for event in profiler.events()
    )
