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
# Some 0.3 ms, in which the host gets ahead of the GPU, so that kernels are timed and not Python.
SLEEP_CYCLES = 500_000


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
    """Time on a device: `start`, and then `lap` after each phase; `read` gives the seconds of each.

    On a GPU the phases are timed by events, with a cold second cache at `start`; on a CPU by the clock.
    """

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda") if self.cuda else None

    def start(self) -> None:
        """Begins a measurement of one phase, or of several without a pause in between."""
        if self.flush is not None:
            self.flush.zero_()
            torch.cuda._sleep(SLEEP_CYCLES)
            self._marks: list[torch.cuda.Event] = []
        else:
            self._times: list[float] = []
        self.lap()

    def lap(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._times.append(time.perf_counter())

    def read(self) -> Sample:
        if self.cuda:
            self._marks[-1].synchronize()
            pairs = zip(self._marks, self._marks[1:], strict=False)
            return tuple(start.elapsed_time(end) / 1e3 for start, end in pairs)
        return tuple(end - start for start, end in zip(self._times, self._times[1:], strict=False))


def timed(function: Callable[[], object], watch: Stopwatch) -> Variant:
    """`function` as a variant of one phase."""

    def variant() -> Sample:
        watch.start()
        function()
        watch.lap()
        return watch.read()

    return variant


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
    from ewa_kernels.kernels.scratch import Scratch  # which an older commit, compared with this one, has not

    Scratch.clear()  # what a call takes over from the one before counts too
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
