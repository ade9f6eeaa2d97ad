"""Large memory that the next step uses again: of gradients, and of what forward keeps for backward.

glibc gives blocks of 32 MB and more back to the system as soon as they are free, and smaller ones when they lie at the
end of its heap, as after a backward. New memory costs zeros for each page of it: a third of forward and backward where
an expert has few rows. Experts have E times as many gradients as the FFN they replace.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor


class _Block:
    """Memory that torch allocated."""

    def __init__(self, size: int):
        self.size = size
        self.array: Any = torch.empty(size, dtype=torch.uint8, device="cpu").numpy()

    def hand_out(self, back: deque[_Block]) -> torch.UntypedStorage:
        """A storage of it. When nothing has that any more, `.grad` included, the block is appended to `back`."""
        view = self.array[:]  # which the storage refers to
        weakref.finalize(view, back.append, self).atexit = False
        return torch.from_numpy(view).untyped_storage()


class Reused:
    """All in a process: at most twice as many bytes as were in use at a time.

    A step may ask for P bytes of pre-activations and then for G of gradients while it frees the P: as many as
    max(P, G) are in use at a time, and P + G are kept, so that the next step finds all of them.
    """

    LEAST_BYTES = 2**20  # less is not worth the looking
    _lock: ClassVar[threading.RLock] = threading.RLock()
    # Free, and not yet in `_free`: whoever drops the last reference must not wait for a lock.
    _back: ClassVar[deque[_Block]] = deque()
    _free: ClassVar[list[_Block]] = []  # as they came back
    # Bytes: in blocks; in blocks that tensors have; the most of these in the time before and in this time; asked for in
    # this time, which ends when that is four times the most: after two steps or more.
    _held: ClassVar[int] = 0
    _in_use: ClassVar[int] = 0
    _most: ClassVar[tuple[int, int]] = (0, 0)
    _asked: ClassVar[int] = 0

    @classmethod
    def empty(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """As `torch.empty`; the storage cannot be resized."""
        size = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or size < cls.LEAST_BYTES:
            return torch.empty(shape, dtype=dtype, device=device)
        with cls._lock:
            storage = cls._take(size).hand_out(cls._back)
        like = torch.empty(tuple(shape), dtype=dtype, device="meta")
        # No view of another tensor: those that were made without gradients must not be changed in place.
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, like.shape, like.stride())

    @classmethod
    def _take(cls, size: int) -> _Block:
        cls._collect()
        before, most = cls._most
        cls._asked += size
        if cls._asked > 4 * max(before, most):
            before, most, cls._asked = most, 0, 0
        cls._most = before, max(most, cls._in_use + size)
        # Of this size that which came back last, which is the likeliest to be in a cache.
        which = next((i for i in reversed(range(len(cls._free))) if cls._free[i].size == size), None)
        block = None if which is None else cls._free.pop(which)
        cls._forget(2 * max(cls._most) - (size if block is None else 0))
        if block is None:
            block = _Block(size)
            cls._held += size
        cls._in_use += size
        return block

    @classmethod
    def _collect(cls) -> None:
        """Takes back what nobody has any more."""
        while cls._back:
            block = cls._back.popleft()
            cls._in_use -= block.size
            cls._free.append(block)

    @classmethod
    def _forget(cls, most: int) -> None:
        """Of what is free, what came back first, until no more than so many bytes are held."""
        while cls._held > most and cls._free:
            cls._held -= cls._free.pop(0).size

    @classmethod
    def clear(cls) -> None:
        """Forgets all. What a tensor has, stays."""
        with cls._lock:
            cls._collect()
            cls._forget(0)
            cls._most, cls._asked = (0, 0), 0

    @classmethod
    def _after_fork(cls) -> None:
        """Another thread may have held the lock."""
        cls._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Reused._after_fork)
