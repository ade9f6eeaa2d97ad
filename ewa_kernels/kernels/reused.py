"""Large memory that the next step uses again: of gradients, and of what forward keeps for backward.

glibc gives blocks of 32 MB and more back to the system as soon as they are free, and smaller ones when the end of its
heap is free, as after a backward. New memory costs zeros for each page of it: a third of forward and backward where an
expert has few rows. Experts have E times as many gradients as the FFN they replace.
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
        self.given_out = self.last_used = 0  # in which call; the latter is when it was last seen in use

    def references(self) -> int:
        return sys.getrefcount(self.array)


class Reused:
    """All in a process. A tensor's memory is given out again when nothing has it any more, `.grad` included."""

    LEAST_BYTES = 2**20  # less is not worth the looking
    _blocks: ClassVar[list[_Block]] = []
    _most_used: ClassVar[int] = 0  # at the same time
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
            free = []
            for block in cls._blocks:
                if block.references() == cls._of_no_tensor:
                    free.append(block)
                else:
                    block.last_used = cls._calls
            found = next((block for block in free if block.array.size == size), None)
            if found is None:
                found = _Block(size)
                cls._blocks.append(found)
            else:
                free.remove(found)
            found.given_out = found.last_used = cls._calls
            cls._forget(free)
            storage = torch.from_numpy(found.array).untyped_storage()
            like = torch.empty(tuple(shape), dtype=dtype, device="meta")
            # No view of another tensor: those that were made without gradients must not be changed in place.
            return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, like.shape, like.stride())

    @classmethod
    def _forget(cls, free: list[_Block]) -> None:
        """Of what is free, what was given out longest ago: if there are more blocks than were ever in use at a time, as
        with inputs that never have the same length twice; and what was not in use while all others were asked for four
        times, as of a model that is trained no more."""
        cls._most_used = max(cls._most_used, len(cls._blocks) - len(free))
        free.sort(key=lambda block: block.given_out)
        too_many = len(cls._blocks) - cls._most_used
        oldest = cls._calls - 4 * len(cls._blocks) - 1
        gone = [block for i, block in enumerate(free) if i < too_many or block.last_used < oldest]
        cls._blocks = [block for block in cls._blocks if block not in gone]

    @classmethod
    def clear(cls) -> None:
        """Forgets all. What a tensor has, stays."""
        with cls._lock:
            cls._blocks = []
            cls._most_used = 0
