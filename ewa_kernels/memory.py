"""Where tensors lie in memory, and whether any two share some: exact, however they are strided."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_MANY = 1024


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether an element may be in memory that is another's too."""
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += step * (size - 1)
    return False


class Place(NamedTuple):
    """Memory of a tensor: pieces of `size` bytes; in each dimension `count` of them, `step` bytes apart."""

    device: str
    start: int
    end: int
    name: str
    size: int
    steps: tuple[tuple[int, int], ...]  # (step, count), count > 1


def places(name: str, tensor: Tensor) -> Iterator[Place]:
    if tensor.numel() == 0 or tensor.device.type == "meta" or torch.compiler.is_compiling():
        return
    device, start, size = str(tensor.device), tensor.data_ptr(), tensor.element_size()
    steps: list[tuple[int, int]] = []
    for stride, count in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        step = stride * tensor.element_size()
        if not steps and step == size:
            size *= count
        elif count > 1:
            steps.append((step, count))
    if len(steps) == 1 and steps[0][1] <= _MANY:
        # Many tensors may be slices of one buffer: pieces without gaps are compared with their neighbours only.
        step, count = steps[0]
        yield from (Place(device, p, p + size, name, size, ()) for p in range(start, start + step * count, step))
    else:
        reach = sum(step * (count - 1) for step, count in steps)
        yield Place(device, start, start + reach + size, name, size, tuple(steps))


def overlaps(all_places: list[Place]) -> Iterator[tuple[Place, Place]]:
    """Pairs that share memory, the first of which is enough for an error."""
    near: list[Place] = []
    for place in sorted(all_places):
        near = [other for other in near if other.device == place.device and other.end > place.start]
        yield from ((other, place) for other in near if _overlap(other, place))
        near.append(place)


def _overlap(first: Place, second: Place) -> bool:
    """Whether the difference of two pieces' addresses is less than their sizes for any two of them."""
    of_first, of_second = dict(first.steps), dict(second.steps)
    steps = [
        (step, 1 - of_second.get(step, 1), of_first.get(step, 1) - 1)
        for step in sorted({*of_first, *of_second}, reverse=True)
    ]
    return _reaches(first.start - second.start, steps, -first.size, second.size)


def _reaches(offset: int, steps: list[tuple[int, int, int]], low: int, high: int) -> bool:
    """Whether low < offset + Σ step·k < high for any integers k, least ≤ k ≤ most; `steps`: (step, least, most)."""
    if not steps:
        return low < offset < high
    if low + 1 + (offset - low - 1) % math.gcd(*(step for step, _, _ in steps)) >= high:
        return False
    (step, least, most), *rest = steps
    down, up = (sum(smaller * times[i] for smaller, *times in rest) for i in (0, 1))
    least = max(least, (low - offset - up) // step + 1)
    most = min(most, -((offset + down - high) // step) - 1)
    return any(_reaches(offset + k * step, rest, low, high) for k in range(least, most + 1))
