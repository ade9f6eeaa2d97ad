"""One timer for all benchmarks: variants take turns in one run, so that whatever slows the machine slows all."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ewa_kernels.kernels.blocked_ffn import Scratch

MIN_ROUNDS, MAX_ROUNDS = 5, 41
# Twice NVIDIA's largest second cache: writing it leaves nothing of what a kernel will read.
FLUSH_BYTES = 2**28
# Some 0.3 ms, in which the host gets ahead of the GPU, so that kernels are timed and not Python.
SLEEP_CYCLES = 500_000


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call."""

    median: float
    p20: float
    p80: float
    rounds: int

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 5) for name, value in asdict(self).items()}


# A variant is called once a round, does its work, and tells how long each phase of it took, in seconds.
Variant = Callable[[], tuple[float, ...]]


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

    def read(self) -> tuple[float, ...]:
        if self.cuda:
            self._marks[-1].synchronize()
            pairs = zip(self._marks, self._marks[1:], strict=False)
            return tuple(start.elapsed_time(end) / 1e3 for start, end in pairs)
        return tuple(end - start for start, end in zip(self._times, self._times[1:], strict=False))


def timed(function: Callable[[], object], watch: Stopwatch) -> Variant:
    """`function` as a variant of one phase."""

    def variant() -> tuple[float, ...]:
        watch.start()
        function()
        watch.lap()
        return watch.read()

    return variant


def interleaved(
    variants: Mapping[str, Variant], seconds: float, min_rounds: int = MIN_ROUNDS, max_rounds: int = MAX_ROUNDS
) -> dict[str, list[Timing]]:
    """Calls every variant once a round, for `seconds`, after a round of warm-up that does not count.

    Each round begins with another variant, so that none always follows the same one.

    Returns:
        for each variant the timing of each phase.
    """
    names = list(variants)
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    for name in names:
        variants[name]()
    deadline = time.monotonic() + seconds
    for i in range(max_rounds):
        if i >= min_rounds and time.monotonic() > deadline:
            break
        first = i % len(names) if names else 0
        for name in names[first:] + names[:first]:
            samples[name].append(variants[name]())
    return {name: [timing(phase) for phase in zip(*taken, strict=True)] for name, taken in samples.items()}


def timing(seconds: tuple[float, ...]) -> Timing:
    """Of at least two samples."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(1e3 * statistics.median(seconds), 1e3 * fifths[0], 1e3 * fifths[-1], len(seconds))


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """The most memory in tensors that a call holds at a time, beyond what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
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
