"""Which form of the layer is the fastest on a GPU: as measured, or, where nothing was, as a model of the GPU says.

`forms.json`, beside this file, has an entry for each of some shapes, and says of each whether it was measured; other
shapes go by the nearest one. `python -m benchmarks.tune` measures the GPU at hand and writes such a file: entries of
the one that the environment variable EWA_KERNELS_FORMS names come in place of ours for the same kind of GPU.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..problem import Inputs, Problem
from . import devices

TABLE = Path(__file__).with_name("forms.json")
FORMS = ("single", "split", "onchip", "cublas", "hopper")  # Triton's are named as the backends, without "triton-"
# A predicted gain must be so large before "auto" leaves Triton's forms, which have been measured.
MARGIN = 0.9
# Hopper's kernels are taken for shapes as near as this to one for which they were measured: less than a size doubled.
NEAR = 0.999


@dataclass(frozen=True)
class Entry:
    """Microseconds of each form on a kind of GPU, for a shape.

    Attributes:
        capability: of the GPU, its first digit: 9 for Hopper.
        itemsize: bytes of an element; 2 is float16 or bfloat16.
        forward, backward: microseconds by form.
        measured: whether they are, on such a GPU.
        source: how they came about, for people.
    """

    name: str
    capability: int
    itemsize: int
    gated: bool
    num_rows: int
    num_experts: int
    d_model: int
    d_ff: int
    forward: dict[str, float]
    backward: dict[str, float]
    measured: bool
    source: str

    def __post_init__(self) -> None:
        sizes = (self.capability, self.itemsize, self.num_rows, self.num_experts, self.d_model, self.d_ff)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"{self.name}: sizes must be positive ints, got {sizes}")
        for times in (self.forward, self.backward):
            is_number = all(isinstance(t, (int, float)) and 0 < t < math.inf for t in times.values())
            if not is_number or not {"single", "split"} & set(times) or not set(times) <= set(FORMS):
                raise ValueError(f"{self.name}: microseconds must be positive, by form, got {times}")

    def distance(self, gated: bool, num_rows: int, num_experts: int, d_model: int, d_ff: int) -> float:
        """How unlike a shape is: the sum of how often its sizes double."""
        pairs = ((self.d_model, d_model), (self.d_ff, d_ff), (self.num_rows * num_experts, num_rows * self.num_experts))
        return (self.gated != gated) + sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs)

    def fastest(self, phase: str, forms: Iterable[str]) -> str | None:
        """The best of some forms in a phase; None if none has a time."""
        times: dict[str, float] = getattr(self, phase)
        return min((form for form in forms if form in times), key=lambda form: times[form], default=None)

    def backend(self, has_hopper: bool = True) -> str:
        """What takes the least time, forward and backward together: "triton", whatever its form, "cublas", or "hopper",
        which must have been measured."""
        phases, others = (self.forward, self.backward), ("cublas", "hopper")
        of_triton = sum(min(t for form, t in times.items() if form not in others) for times in phases)
        of_others = {form: sum(times.get(form, math.inf) for times in phases) for form in others}
        totals = {"triton": of_triton * (1.0 if self.measured else MARGIN), "cublas": of_others["cublas"]}
        if has_hopper and self.measured:
            totals["hopper"] = of_others["hopper"]
        return min(totals, key=lambda form: totals[form])


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Of the package, and in place of them those of EWA_KERNELS_FORMS."""
    own = os.environ.get("EWA_KERNELS_FORMS")
    chosen = read(Path(own).expanduser()) if own else ()
    kinds = {(entry.capability, entry.itemsize) for entry in chosen}
    return chosen + tuple(e for e in read(TABLE) if (e.capability, e.itemsize) not in kinds)


def read(path: Path) -> tuple[Entry, ...]:
    """The entries of a file.

    Raises:
        ValueError: it is no such file; the message names it.
    """
    try:
        return tuple(Entry(**entry) for entry in json.loads(path.read_text())["entries"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must be a table of forms, as `python -m benchmarks.tune` writes it: {error}"
        ) from error


def backend_for(inputs: Inputs, is_given: bool, dtype: torch.dtype) -> str:
    """ "triton", "cublas" or "hopper", where "auto" has found that Triton runs: nothing is known of groups that are
    given."""
    x, (num_experts, d_model, d_ff) = inputs.x, inputs.down_weight.shape
    shape = (inputs.up_weight.shape[1] == 2 * d_ff, x.numel() // d_model, num_experts, d_model, d_ff)
    entry = None if is_given else nearest(x.device, dtype, *shape)
    if entry is None:
        return "triton"
    backend = entry.backend()
    if backend == "hopper" and (entry.distance(*shape) > NEAR or devices.why_not_hopper(x.device) is not None):
        return entry.backend(has_hopper=False)
    return backend


def nearest_to(problem: Problem) -> Entry | None:
    """`nearest`, of a call."""
    sizes = (problem.num_rows, problem.num_experts, problem.d_model, problem.d_ff)
    return nearest(problem.device, problem.dtype, problem.gated, *sizes)


def nearest(
    device: torch.device, dtype: torch.dtype, gated: bool, num_rows: int, num_experts: int, d_model: int, d_ff: int
) -> Entry | None:
    """The entry most like a shape on a device; None if there is none for its kind, and on a CPU."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)[0]
    return _nearest(capability, dtype.itemsize, gated, num_rows, num_experts, d_model, d_ff)


@functools.lru_cache(maxsize=1024)  # an operation asks in each call
def _nearest(capability: int, itemsize: int, gated: bool, *sizes: int) -> Entry | None:
    of_kind = [entry for entry in entries() if (entry.capability, entry.itemsize) == (capability, itemsize)]
    return min(of_kind, key=lambda entry: entry.distance(gated, *sizes), default=None)
