"""What stands in for a GPU and for kernels where these are compiled, and nothing is launched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from triton.backends.compiler import GPUTarget


class Driver:
    """As much of a GPU as Triton asks for before it launches: which one it is."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


class Noted:
    """Stands in for a kernel: launches nothing, and notes how to compile what it would."""

    def __init__(self, kernel: Any):
        self._kernel, self.arg_names = kernel, kernel.arg_names
        self.launched: list[Callable[[], Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.launched.append(functools.partial(self._kernel.warmup, *args, grid=grid, **kwargs))

        return launch
