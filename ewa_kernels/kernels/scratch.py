"""Memory to work in."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor


class Scratch:
    """Memory that all blocks share: fresh memory can cost more than the arithmetic done in it.

    On a CPU the next call takes over what the last one left, which is no more than `LEFT_BYTES` in a process.
    """

    LEFT_BYTES = 2**27
    _left: ClassVar[list[dict[str, Tensor]]] = []  # one at the most: calls at the same time have memory of their own

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self._device, self._dtype = device, dtype
        self._memory: dict[str, Tensor]
        try:
            self._memory = self._left.pop() if device.type == "cpu" else {}
        except IndexError:  # nothing is left, or another thread has just taken it
            self._memory = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape) * self._dtype.itemsize
        return self._bytes(name, size)[:size].view(self._dtype).view(shape)

    def address(self, name: str, size: int) -> int:
        """Of so many bytes, until the next call for more by this name."""
        return self._bytes(name, size).data_ptr()

    def _bytes(self, name: str, size: int) -> Tensor:
        memory = self._memory.get(name)
        if memory is None or memory.shape[0] < size:
            with torch.inference_mode(False):  # whose tensors could be used nowhere else
                self._memory[name] = memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        return memory

    @classmethod
    def clear(cls) -> None:
        """Frees what was left."""
        cls._left.clear()

    def leave(self) -> None:
        """Says that all is done with."""
        if self._device.type == "cpu" and sum(map(len, self._memory.values())) <= self.LEFT_BYTES:
            self._left[:] = [self._memory]
