"""`python -m benchmarks.launches`: microseconds of the host for each launch of csrc/hopper, but for the driver's own.

Needs no GPU, but nvcc: what `setup.py build_ext` made of csrc/hopper is linked with a runtime that launches nothing.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pybind11
import torch
from rich.console import Console
from rich.table import Table

import ewa_kernels as ewa
from benchmarks.environment import ROOT, environment
from ewa_kernels.kernels import devices, hopper

CALLS = 2000


def module(folder: Path) -> Any:
    """`_C`'s part for Hopper, without a driver.

    Raises:
        FileNotFoundError: the extension has not been built with it.
    """
    objects = sorted(ROOT.glob("build/temp*/hopper/hopper/*.o"))
    if not objects:
        raise FileNotFoundError("run `EWA_CUDA_ARCHITECTURES=90a python setup.py build_ext --inplace` before")
    includes = [f"-I{path}" for path in (ROOT / "csrc", sysconfig.get_path("include"), pybind11.get_include())]
    target = folder / "hopper_without_driver.so"
    source = ROOT / "tests/cuda_on_host/no_driver.cpp"
    flags = ["-O2", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden"]
    subprocess.run(["c++", *flags, *includes, source, *objects, "-o", target], check=True)
    spec = importlib.util.spec_from_file_location("hopper_without_driver", target)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


class Recorded:
    """Notes the calls of a module's functions that launch something, as it makes them."""

    def __init__(self, native: Any):
        self.native, self.calls = native, list[tuple[str, Callable[[], object]]]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.native, name)
        if not name.startswith("hopper_"):
            return found

        def call(*args: Any, **operands: Any) -> None:
            what = args[0].name if name == "hopper_product" else name.removeprefix("hopper_")
            self.calls.append((what, functools.partial(found, *args, **operands)))
            found(*args, **operands)

        return call


def seconds_of(call: Callable[[], object]) -> float:
    """The best of some rounds."""
    found = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append((time.perf_counter() - start) / CALLS)
    return min(found)


def measure(native: Any) -> list[tuple[str, int, float]]:
    """(what, its launches, µs) for each call of a forward and a backward."""
    recorded = Recorded(native)
    hopper._C = recorded  # type: ignore[attr-defined, assignment]
    devices.why_not_hopper = lambda device: None
    layer = ewa.RandomPartitionMoE(64, 256, 4, dtype=torch.bfloat16, backend="hopper")
    y = layer(torch.randn(64, 64, dtype=torch.bfloat16))
    y.backward(torch.ones_like(y))
    rows = []
    for name, call in recorded.calls:
        before = native.launches()
        call()
        rows.append((name, native.launches() - before, 1e6 * seconds_of(call)))
    return rows


def main() -> int:
    torch.set_num_threads(1)
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        try:
            rows = measure(module(Path(folder)))
        except FileNotFoundError as error:
            console.print(error)
            return 1
    table = Table("call", "launches", "µs")
    for name, launches, microseconds in rows:
        table.add_row(name, str(launches), f"{microseconds:.1f}")
    console.print(environment("cpu"), table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
