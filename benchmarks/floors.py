"""What this device can do at best, measured in the same run: a large matrix product, and a copy."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from benchmarks.cases import DTYPES, Case
from benchmarks.timing import Stopwatch, timed

MATRIX_SIZE = {"cuda": 8192, "cpu": 2048}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
REPEATS = 8


@dataclass(frozen=True)
class Floors:
    """`matrix_rates`: FLOP/s, by the dtype's short name. `copy_rate`: bytes/s, read and written ones counted."""

    matrix_rates: dict[str, float]
    copy_rate: float

    def best(self, other: Floors) -> Floors:
        """The faster of two measurements, figure by figure."""
        rates = {name: max(rate, other.matrix_rates.get(name, rate)) for name, rate in self.matrix_rates.items()}
        return Floors(rates, max(self.copy_rate, other.copy_rate))

    def seconds(self, case: Case, phase: str) -> float:
        """Below which no implementation gets: the larger of arithmetic and memory traffic.

        16-bit numbers may be multiplied in float32 too, where that is faster.
        """
        phases = ("forward", "backward") if phase == "both" else (phase,)
        rate = max(self.matrix_rates[case.dtype_name], self.matrix_rates.get("fp32", 0.0))
        return sum(max(case.operations(p) / rate, case.least_bytes(p) / self.copy_rate) for p in phases)


def measure(device: str, dtypes: Iterable[torch.dtype]) -> Floors:
    """The fastest of some calls: a floor is what the device can do, not what it does on the average."""
    watch = Stopwatch(device)
    rates = {}
    for dtype in dict.fromkeys(dtypes):
        # float16 products are slow on most CPUs.
        size = MATRIX_SIZE[device] // (4 if device == "cpu" and dtype == torch.float16 else 1)
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        # With the weight as it is, and as nn.Linear holds it: where one is slow the other may not be.
        products = [timed(functools.partial(torch.matmul, a, weight), watch) for weight in (b, b.mT)]
        rates[DTYPES[dtype]] = 2.0 * size**3 / min(call()[0] for call in products for _ in range(REPEATS))
    source = torch.randn(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), watch)
    return Floors(rates, 2.0 * COPY_BYTES[device] / min(copy()[0] for _ in range(REPEATS)))
