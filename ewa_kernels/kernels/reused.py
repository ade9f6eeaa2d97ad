"""Memory of large gradients, which the next step uses again.

glibc gives blocks of 32 MB and more back to the system as soon as they are free, and a new one costs zeros for each
page of it: a third of forward and backward where an expert has few rows. Experts have E times as many gradients as
the FFN they replace, so most of a step's are of this size. What is smaller glibc keeps by itself.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor


class _Block:
    """Memory that torch allocated, as an array to which each tensor made of it refers."""

    def __init__(self, size: int):
        self.array: Any = torch.empty(size, dtype=torch.uint8, device="cpu").numpy()
        self.last_used = 0

    def references(self) -> int:
        return sys.getrefcount(self.array)


class Reused:
    """All in a process. A tensor's memory is given out again when nothing has it any more, `.grad` included.

    For tensors of the sizes of parameters, which come again: what has another size each time would fill it.
    """

    LEAST_BYTES = 2**25
    _blocks: ClassVar[dict[int, list[_Block]]] = {}  # by size
    _calls: ClassVar[int] = 0
    _lock: ClassVar[threading.Lock] = threading.Lock()
    _of_no_tensor: ClassVar[int] = _Block(1).references()

    @classmethod
    def empty(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """As `torch.empty`."""
        size = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or size < cls.LEAST_BYTES:
            return torch.empty(shape, dtype=dtype, device=device)
        with cls._lock:
            cls._calls += 1
            cls._forget()
            blocks = cls._blocks.setdefault(size, [])
            block = next((b for b in blocks if b.references() == cls._of_no_tensor), None)
            if block is None:
                block = _Block(size)
                blocks.append(block)
            block.last_used = cls._calls
            storage = torch.from_numpy(block.array).untyped_storage()
            # No view of another tensor: those that were made without gradients must not be changed in place.
            like = torch.empty(tuple(shape), dtype=dtype, device="meta")
            return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, like.shape, like.stride())

    @classmethod
    def _forget(cls) -> None:
        """What has been free while each of the others was asked for four times: its model is trained no more."""
        oldest = cls._calls - 4 * sum(map(len, cls._blocks.values())) - 1
        for size, blocks in list(cls._blocks.items()):
            for block in blocks:
                if block.references() > cls._of_no_tensor:
                    block.last_used = cls._calls
            cls._blocks[size] = [block for block in blocks if block.last_used >= oldest]
            if not cls._blocks[size]:
                del cls._blocks[size]

    @classmethod
    def clear(cls) -> None:
        """Forgets all. What a tensor has, stays."""
        with cls._lock:
            cls._blocks.clear()
